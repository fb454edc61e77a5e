"""The README's main job by its own commands on this device: train, evaluate, and go on from a checkpoint bit for bit.

DALI is not on every machine with a GPU, so a loader that keeps the few images in memory stands for it; everything
after the loader is the product's own.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from machine import spread
from pixelgen_kernels import philox
from safetensors.torch import load_file
from training import CONFIGS, load_config

from gpu.child import device
from gpu.steps import ready
from pixelgen_fast.data import Batch
from pixelgen_fast.data.encoded import load, to_rgb
from pixelgen_fast.data.image_index import ImageIndex
from pixelgen_fast.data.order import Order, positions


class InMemory:
    """Stands for `data.dali.Loader` where every image of the index has the training size and fits in memory."""

    def __init__(self, index: ImageIndex, order: Order, settings: Any, device: torch.device, **other: Any):
        images = np.stack([np.asarray(to_rgb(load(index.read(i)))) for i in range(len(index))])
        self.images, self.labels = torch.from_numpy(images).to(device), torch.from_numpy(index.labels).to(device)
        self.order, self.flip, self.size, self.batch = order, settings.flip, len(index), 0
        self.wait_seconds, self.replaced = 0.0, {}

    def __iter__(self) -> InMemory:
        return self

    def __next__(self) -> Batch:
        numbers = self.order.numbers(self.batch)
        self.batch += 1
        at = torch.from_numpy(positions(self.order.seed, numbers, self.size))
        at, numbers = at.to(self.images.device), torch.tensor(numbers)
        images = self.images[at]
        if self.flip:
            mirrored = philox.uniform(self.order.seed, numbers, philox.FLIP, 1)[:, 0] < 0.5
            images = torch.where(mirrored.to(images.device)[:, None, None, None], images.flip(2), images)
        return Batch(images, self.labels[at], numbers.to(images.device))

    def close(self) -> None: ...

    def __enter__(self) -> InMemory:
        return self

    def __exit__(self, *error: object) -> None: ...


def measure(
    row: Callable[..., None], device_free: Callable[[], None], config: str, images: int,
    overrides: Sequence[str] = (), evaluate: bool = True,
) -> None:  # fmt: skip
    """images: of a step. overrides: of the configuration, which leave a checkpoint beside the last one."""
    stand_in = ModuleType("pixelgen_fast.data.dali")
    stand_in.Loader = InMemory
    sys.modules[stand_in.__name__] = stand_in
    from pixelgen_fast.cli import main

    ready(load_config(config, images, *overrides), "ours")
    device_free()
    with tempfile.TemporaryDirectory() as place:
        first, again = Path(place, "first"), Path(place, "again")

        def train(folder: Path) -> float:
            begin = time.perf_counter()
            words = [f"run.dir={folder}", f"run.device={device()}", *overrides]
            if code := main(["train", str(CONFIGS / f"{config}.yaml"), *words]):
                row(red=f"pixelgen train {config} ended with {code}")
            return time.perf_counter() - begin

        seconds = train(first)
        rows = [json.loads(line) for line in (first / "metrics.jsonl").read_text().splitlines()]
        low, rate, high = spread(r["images_per_second"] for r in rows[1:] if "images_per_second" in r)
        row(config=config, seconds=seconds, images=rows[-1]["nimg"], images_per_s=rate, p20=low, p80=high,
            last_loss=rows[-1].get("loss"))  # fmt: skip
        if evaluate:
            if code := main(["evaluate", str(first), "--device", device()]):
                row(red=f"pixelgen evaluate ended with {code}")
            report = json.loads((first / "evaluation.json").read_text())["report"]
            row(config=config, evaluation=report)
        old, last = sorted(path for path in (first / "checkpoints").iterdir())[-2:]
        shutil.copytree(old, again / "checkpoints" / old.name)
        train(again)
        a, b = (tensors(run / "checkpoints" / last.name) for run in (first, again))
        apart = sorted(name for name in a.keys() | b.keys() if name not in a or not torch.equal(a[name], b[name]))
        row(config=config, resumed_from=int(old.name), tensors=len(a), apart=len(apart))
        if apart or not a:
            row(red=f"resumed training differs in {len(apart)} of {len(a)} tensors, such as {', '.join(apart[:4])}")


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in checkpoint.glob("*.safetensors"):
        found |= load_file(file)
    return found
