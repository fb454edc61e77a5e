"""Images per second of the data loader, beside a PyTorch DataLoader that decodes and crops with PIL.

    python benchmarks/loader.py --images 256 --height 375 --width 500 --size 256 --threads 2 --workers 1

Makes JPEG images of one size (areas, texture, noise), then times each provider in turn, `--repeats` times, so that
what else the machine does meets all alike. Prints a Markdown table (median, spread, start-up seconds to the first
batch) and appends one JSON line to --out.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from machine import RESULTS, append, machine
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from pixelgen_fast.config import Data
from pixelgen_fast.data.crop import centre_crop
from pixelgen_fast.data.dali import Loader
from pixelgen_fast.data.encoded import decode
from pixelgen_fast.data.image_index import ImageIndex
from pixelgen_fast.data.index import open_index
from pixelgen_fast.data.order import Order, position
from pixelgen_fast.data.pack import pack


class PilImages(Dataset):
    """The same images in the same order as the loader's, decoded and cropped by PIL: uint8 [S, S, 3] and label."""

    def __init__(self, index: ImageIndex, size: int, count: int) -> None:
        self.index, self.size, self.count = index, size, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> tuple[torch.Tensor, int]:
        i = position(0, number, len(self.index))
        return torch.from_numpy(np.array(centre_crop(decode(self.index.read(i)), self.size))), self.index.label(i)


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


def providers(args: argparse.Namespace, index: ImageIndex, packed: ImageIndex) -> dict[str, Iterator]:
    """Name -> function that starts an endless iterator of batches."""
    order = Order(seed=0, global_batch=args.batch, micro_batch=args.batch)

    def ours(source: ImageIndex, workers: int):
        settings = Data(image_size=args.size, workers=workers, threads=args.threads)
        return lambda: Loader(source, order, settings, args.device)

    def pil():
        images = PilImages(index, args.size, 10**9)
        return iter(DataLoader(images, args.batch, num_workers=args.threads, multiprocessing_context="spawn"))

    return {
        f"Loader, {args.threads} threads, read in process": ours(index, 0),
        f"Loader, {args.threads} threads, {args.workers} readers": ours(index, args.workers),
        f"Loader on packed data, {args.threads} threads": ours(packed, 0),
        f"PIL DataLoader, {args.threads} processes": pil,
    }


def measure(start, batches: int, batch: int) -> tuple[float, float]:
    """(images/s after warm-up, seconds from start to the first batch)."""
    began = time.perf_counter()
    iterator = start()
    next(iterator)
    first = time.perf_counter() - began
    for _ in range(3):
        next(iterator)
    began = time.perf_counter()
    for _ in range(batches):
        images = next(iterator)[0]
    if images.is_cuda:
        torch.cuda.synchronize()
    rate = batches * batch / (time.perf_counter() - began)
    if isinstance(iterator, Loader):
        iterator.close()
    return rate, first


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
    parser.add_argument("--threads", type=int, default=2, help="decoder threads, and processes of the PIL DataLoader")
    parser.add_argument("--workers", type=int, default=1, help="reader processes")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--out", type=Path, default=RESULTS / "loader.jsonl")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "jpeg"
        root.mkdir()
        mean_bytes = write_jpegs(root, args.images, args.height, args.width, args.quality)
        pack(root, Path(folder) / "packed", args.size)
        found = providers(args, open_index(root), open_index(Path(folder) / "packed"))
        rates: dict[str, list[float]] = {name: [] for name in found}
        starts: dict[str, list[float]] = {name: [] for name in found}
        for _ in range(args.repeats):
            for name, start in found.items():
                rate, first = measure(start, args.batches, args.batch)
                rates[name].append(rate)
                starts[name].append(first)

    base = statistics.median(rates[name := list(found)[-1]])
    print(
        f"{args.height} x {args.width} JPEG, {mean_bytes / 1e3:.0f} kB -> {args.size} px, batch {args.batch}, "
        f"{args.device}; {args.repeats} interleaved repeats of {args.batches} batches\n"
    )
    print(f"| provider | images/s, median | lowest to highest | ratio to {name.split(',')[0]} | first batch, s |")
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
