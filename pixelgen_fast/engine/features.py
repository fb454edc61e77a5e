"""A teacher's features on disk, one row for each image of the data set, filled as training first meets the images.

    <folder>/fingerprint.json    what the rows depend on: teacher, data set, image size, number and shape of the rows
             features.npy        float16 [N, L, D], memory-mapped; sparse until it is filled
             seals.npy           uint32 [N], 0 for an empty row, else CRC-32 of the image and then of its features

A row counts only when its seal fits the image at hand and what is stored: a torn write, a changed file or another image
in a damaged one's place is a miss, and the row is made again. So several processes may fill one folder, and a process
may be killed at any moment. What comes out is rounded to float16 also when it has just been made: a run gives the same
numbers whatever the cache held before. The disk must have room for 2 N L D bytes.
"""

from __future__ import annotations

import json
import shutil
import zlib
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from pixelgen_fast.config import ConfigError
from pixelgen_fast.data.cache import locked, published_folder
from pixelgen_fast.data.image_index import ImageIndex
from pixelgen_fast.data.sampler import choose_sampler


class Featurizer(Protocol):
    """What gives features: `pixelgen_fast.dino.teacher.Teacher`."""

    grid: int
    width: int

    def __call__(self, images: Tensor) -> Tensor: ...
    def fingerprint(self) -> str: ...


class FeatureCache:
    """`cache(images uint8 [B, S, S, 3], numbers int64 [B])` gives the teacher's features [B, L, D] of those images.

    folder: made if missing. index, seed, class_balanced: the data set and the run's order, which give image number n
    its place in the data set. size, crop: how images are made from files. On a GPU each call waits for the images.
    Raises ConfigError for a folder that was filled with another teacher or data set, or a disk too small for it.
    """

    def __init__(
        self,
        folder: str | Path,
        teacher: Featurizer,
        index: ImageIndex,
        *,
        seed: int,
        size: int,
        crop: str,
        class_balanced: bool = False,
    ) -> None:
        self.folder, self.teacher, self.count = Path(folder).absolute(), teacher, len(index)
        self.sampler = choose_sampler(index, seed, class_balanced)
        shape = (self.count, teacher.grid**2, teacher.width)
        wanted = {
            "teacher": teacher.fingerprint(),
            "data": index.fingerprint,
            "image_size": size,
            "crop": crop,
            "features": list(shape),
        }
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(self.folder.with_name(f".{self.folder.name}.lock")):
            if not self.folder.exists():
                self._make(wanted, shape)
        self._check(wanted)
        self._features = np.load(self.folder / "features.npy", mmap_mode="r+")
        self._seals = np.load(self.folder / "seals.npy", mmap_mode="r+")

    def __call__(self, images: Tensor, numbers: Tensor) -> Tensor:
        rows = self.sampler.indexes(numbers.tolist()).tolist()
        seals = [zlib.crc32(image) for image in images.cpu().contiguous().numpy()]
        features = np.array(self._features[rows])
        absent = [b for b, row in enumerate(rows) if _seal(seals[b], features[b]) != self._seals[row]]
        if absent:
            made = self.teacher(images[torch.tensor(absent, device=images.device)])
            features[absent] = made.to("cpu", torch.float16).numpy()
            for b in absent:
                self._features[rows[b]] = features[b]
                self._seals[rows[b]] = _seal(seals[b], features[b])
        return torch.from_numpy(features).to(images.device)

    def _make(self, wanted: dict[str, Any], shape: tuple[int, ...]) -> None:
        need, free = 2 * int(np.prod(shape, dtype=np.int64)), shutil.disk_usage(self.folder.parent).free
        if need > free:
            raise ConfigError(
                f"alignment.cache {self.folder}: the features of {self.count:,} images need {need / 1e9:.1f} GB, "
                f"{free / 1e9:.1f} GB are free; choose another disk, or alignment.cache=null"
            )
        with published_folder(self.folder) as work:
            np.lib.format.open_memmap(work / "features.npy", mode="w+", dtype=np.float16, shape=shape)
            np.lib.format.open_memmap(work / "seals.npy", mode="w+", dtype=np.uint32, shape=shape[:1])
            (work / "fingerprint.json").write_text(json.dumps(wanted, indent=1) + "\n")

    def _check(self, wanted: dict[str, Any]) -> None:
        path = self.folder / "fingerprint.json"
        try:
            found = json.loads(path.read_text())
        except (OSError, json.JSONDecodeError) as error:
            raise ConfigError(
                f"alignment.cache {self.folder}: exists and is no feature cache ({error}); choose another folder"
            ) from error
        changed = [f"{key} {found.get(key)} -> {wanted[key]}" for key in wanted if found.get(key) != wanted[key]]
        if changed:
            raise ConfigError(
                f"alignment.cache {self.folder} was filled for something else: {'; '.join(changed)}; choose another "
                "folder, or delete this one"
            )


def _seal(image_seal: int, features: np.ndarray) -> int:
    """CRC-32 that goes on from the image's over its features; 0 means an empty row, so it is 1 instead."""
    return zlib.crc32(features, image_seal) or 1
