"""Bytes of resident memory that each image through the loader adds to the main process.

    python benchmarks/loader_memory.py --images 250000 --files 20000 --size 32 --workers 1

Makes small JPEG images of many sizes, draws --images of them in passes, and reads the process's resident memory now
and then. Prints the growth an image after the first tenth: by the slope of a line through all readings, and from the
first to the last; and the range of the readings. Appends one JSON line to --out.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from machine import RESULTS, append, machine
from PIL import Image

from pixelgen_fast.config import Data
from pixelgen_fast.data.dali import Loader
from pixelgen_fast.data.index import open_index
from pixelgen_fast.data.order import Order
from pixelgen_fast.engine.memory import keep_freed_memory

READINGS = 100


def write_jpegs(root: Path, count: int, least: int, most: int) -> None:
    """`count` JPEG images of sides from `least` to `most`, in ten classes."""
    rng = np.random.default_rng(0)
    for k in range(count):
        (root / str(k % 10)).mkdir(exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        sides = tuple(rng.integers(least, most, 2, endpoint=True).tolist())
        coarse.resize(sides, Image.Resampling.BILINEAR).save(root / str(k % 10) / f"{k}.jpg", quality=40 + k % 56)


def resident() -> int:
    """Bytes of this process's resident memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def measure(root: Path, args: argparse.Namespace) -> list[tuple[int, int]]:
    """(images so far, resident bytes), READINGS times."""
    order = Order(seed=0, global_batch=args.batch, micro_batch=args.batch)
    settings = Data(image_size=args.size, workers=args.workers, threads=args.threads, flip=args.flip)
    readings, seen = [], 0
    with Loader(open_index(root), order, settings) as loader:
        for k in range(1, READINGS + 1):
            while seen < args.images * k // READINGS:
                next(loader)
                seen += args.batch
            readings.append((seen, resident()))
    return readings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=250_000, help="images drawn")
    parser.add_argument("--root", type=Path, help="a data set to read in place of files that are made")
    parser.add_argument("--files", type=int, default=20_000, help="JPEG files to make")
    parser.add_argument("--least", type=int, default=20, help="smallest side of a file")
    parser.add_argument("--most", type=int, default=120, help="largest side of a file")
    parser.add_argument("--size", type=int, default=32, help="pixels a side of a training image")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--workers", type=int, default=1, help="reader processes")
    parser.add_argument("--flip", action="store_true")
    parser.add_argument(
        "--keep-freed", action="store_true", help="have the C library keep freed memory, as a CPU run does"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "loader_memory.jsonl")
    args = parser.parse_args()
    if args.keep_freed:
        keep_freed_memory()
    torch.set_num_threads(args.threads)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        if args.root is None:
            write_jpegs(Path(folder), args.files, args.least, args.most)
        readings = measure(args.root or Path(folder), args)
    images, memory = np.array(readings[READINGS // 10 - 1 :], dtype=np.float64).T
    slope = np.polyfit(images, memory, 1)[0]
    ends = (memory[-1] - memory[0]) / (images[-1] - images[0])
    print(
        f"{args.images:,} images in {time.perf_counter() - began:.0f} s: {slope:.0f} bytes an image by the slope, "
        f"{ends:.0f} from the first tenth to the end; {memory.min() / 1e6:.0f} to {memory.max() / 1e6:.0f} MB"
    )
    record = {name: value for name, value in vars(args).items() if name != "out"} | {"root": str(args.root)}
    append(args.out, record | {"slope": slope, "ends": ends, "readings": readings} | machine("cpu"))


if __name__ == "__main__":
    main()
