"""Images per second of the data loader by its settings, on a CPU or a GPU. With others: `pixelgen data bench`.

    python benchmarks/loader.py --images 256 --height 375 --width 500 --size 256 --threads 2 --workers 1

Makes JPEG images of one size (areas, texture, noise), then times each setting in turn, `--repeats` times, so that
what else the machine does meets all alike. Prints a Markdown table (median, spread, start-up seconds to the first
batch) and appends one JSON line to --out.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from machine import RESULTS, append, machine
from PIL import Image

from pixelgen_fast.config import Data
from pixelgen_fast.data.dali import Loader
from pixelgen_fast.data.image_index import ImageIndex
from pixelgen_fast.data.index import open_index
from pixelgen_fast.data.order import Order
from pixelgen_fast.data.pack import pack


def write_jpegs(root: Path, count: int, height: int, width: int, quality: int) -> int:
    """Write `count` JPEG images in two classes; return their mean size in bytes."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width]
    texture = 30 * np.sin(x / 7 + y / 11)[..., None]
    for k in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (height // 16 + 2, width // 16 + 2, 3), dtype=np.uint8))
        areas = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32)
        pixels = np.clip(areas + texture + rng.normal(0, 6, areas.shape), 0, 255).astype(np.uint8)
        (root / f"class{k % 2}").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(root / f"class{k % 2}" / f"{k:05d}.jpg", quality=quality)
    return sum(p.stat().st_size for p in root.rglob("*.jpg")) // count


def loaders(args: argparse.Namespace, index: ImageIndex, packed: ImageIndex) -> dict[str, Callable[[], Loader]]:
    """Name -> function that starts a loader."""
    order = Order(seed=0, global_batch=args.batch, micro_batch=args.batch)

    def with_settings(source: ImageIndex, workers: int) -> Callable[[], Loader]:
        settings = Data(image_size=args.size, workers=workers, threads=args.threads)
        return lambda: Loader(source, order, settings, args.device)

    return {
        f"Loader, {args.threads} threads, read in process": with_settings(index, 0),
        f"Loader, {args.threads} threads, {args.workers} readers": with_settings(index, args.workers),
        f"Loader on packed data, {args.threads} threads": with_settings(packed, 0),
    }


def measure(start: Callable[[], Loader], batches: int, batch: int) -> tuple[float, float]:
    """(images/s after warm-up, seconds from start to the first batch)."""
    began = time.perf_counter()
    with start() as loader:
        next(loader)
        first = time.perf_counter() - began
        for _ in range(3):
            next(loader)
        began = time.perf_counter()
        for _ in range(batches):
            images = next(loader).images
        if images.is_cuda:
            torch.cuda.synchronize()
        return batches * batch / (time.perf_counter() - began), first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=128, help="JPEG files to make")
    parser.add_argument("--height", type=int, default=375)
    parser.add_argument("--width", type=int, default=500)
    parser.add_argument("--quality", type=int, default=90)
    parser.add_argument("--size", type=int, default=256, help="pixels a side of a training image")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--batches", type=int, default=12, help="batches timed per repeat")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2, help="threads that decode and crop")
    parser.add_argument("--workers", type=int, default=1, help="reader processes")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--out", type=Path, default=RESULTS / "loader.jsonl")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "jpeg"
        root.mkdir()
        mean_bytes = write_jpegs(root, args.images, args.height, args.width, args.quality)
        pack(root, Path(folder) / "packed", args.size)
        found = loaders(args, open_index(root), open_index(Path(folder) / "packed"))
        rates: dict[str, list[float]] = {name: [] for name in found}
        starts: dict[str, list[float]] = {name: [] for name in found}
        for _ in range(args.repeats):
            for name, start in found.items():
                rate, first = measure(start, args.batches, args.batch)
                rates[name].append(rate)
                starts[name].append(first)

    base = statistics.median(rates[next(iter(found))])
    print(
        f"{args.height} x {args.width} JPEG, {mean_bytes / 1e3:.0f} kB -> {args.size} px, batch {args.batch}, "
        f"{args.device}; {args.repeats} interleaved repeats of {args.batches} batches\n"
    )
    print("| loader | images/s, median | lowest to highest | ratio to the first | first batch, s |")
    print("|---|---|---|---|---|")
    for name in found:
        median, first = statistics.median(rates[name]), statistics.median(starts[name])
        spread = f"{min(rates[name]):.0f} to {max(rates[name]):.0f}"
        print(f"| {name} | {median:.0f} | {spread} | {median / base:.2f} | {first:.2f} |")

    record = {name: value for name, value in vars(args).items() if name != "out"}
    record |= {"jpeg_bytes": mean_bytes, "images_per_s": rates, "first_batch_s": starts}
    append(args.out, record | machine(args.device))


if __name__ == "__main__":
    main()
