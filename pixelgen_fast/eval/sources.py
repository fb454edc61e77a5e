"""Images to be judged: held in memory, or a data set on disk, cropped as for training; one size for all.

Shapes: N images uint8 [N, H, W, 3].
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pixelgen_fast.data.cropped import read_cropped
from pixelgen_fast.data.encoded import UnreadableImage, inspect
from pixelgen_fast.data.image_index import ImageIndex
from pixelgen_fast.data.roots import DIGITS, open_root
from pixelgen_fast.data.storage import read_bytes
from pixelgen_fast.errors import InputError
from pixelgen_fast.settings import Crop

Images = Tensor | str | Path

LEAST = 10
_THREADS = 8  # enough to decode files, and unlike worker processes they cannot outlive an error


class Source(ABC):
    """N images of one size. name: for people. crop: what was done to them, in words; None where nothing was."""

    name: str
    crop: str | None = None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def image(self, i: int) -> np.ndarray:
        """Image i, uint8 [H, W, 3]. Raises InputError, naming it, where it cannot be read."""

    @abstractmethod
    def shape(self, i: int) -> tuple[int, int]:
        """(height, width) that image i will have; nothing is decoded for it."""

    def check_sizes(self) -> None:
        """Raise InputError for images of several sizes, or that cannot be read, by their headers."""
        with ThreadPoolExecutor(_THREADS) as pool:
            _one_size(pool.map(self.shape, range(len(self))))

    def batches(self, batch: int) -> Iterator[Tensor]:
        """All images in order, uint8 [n, H, W, 3] each. Raises InputError where they have several sizes."""
        sizes: set[tuple[int, int]] = set()
        with ThreadPoolExecutor(_THREADS) as pool:
            for numbers in torch.arange(len(self)).split(batch):
                images = list(pool.map(self.image, numbers.tolist()))
                sizes |= {image.shape[:2] for image in images}
                _one_size(sizes)
                yield torch.from_numpy(np.stack(images))


class _InMemory(Source):
    name = "held in memory"

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def image(self, i: int) -> np.ndarray:
        return self.images[i].numpy()

    def shape(self, i: int) -> tuple[int, int]:
        return tuple(self.images.shape[1:3])


class _OnDisk(Source):
    def __init__(self, index: ImageIndex, size: int | None, crop: Crop) -> None:
        self.index, self.size, self.how = index, size, crop
        self.name = index.root.name
        if size is not None:
            self.crop = f"crop {crop} to {size}"

    def __len__(self) -> int:
        return len(self.index)

    def image(self, i: int) -> np.ndarray:
        try:
            return read_cropped(self.index, i, self.size, self.how)
        except UnreadableImage as error:
            raise InputError(f"{self.index.path(i)} of {self.index.root}: {error}") from error

    def shape(self, i: int) -> tuple[int, int]:
        try:
            header = inspect(read_bytes(self.index, i))
        except UnreadableImage as error:
            raise InputError(f"{self.index.path(i)} of {self.index.root}: {error}") from error
        cropped = self.size is not None and self.how == "adm"
        return (self.size, self.size) if cropped else (header.height, header.width)


def open_source(images: Images, size: int | None = None, crop: Crop = "adm") -> Source:
    """The images to judge. size: the side to which those on disk are cropped; None takes them as they are.

    Raises FileNotFoundError where there is nothing, InputError for images of another type or shape, or too few.
    """
    if isinstance(images, Tensor):
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[-1] != 3:
            raise InputError(f"images must be uint8 [N, H, W, 3], got {images.dtype} {list(images.shape)}")
        source: Source = _InMemory(images.cpu())
    else:
        if str(images) != DIGITS and not Path(images).expanduser().exists():
            raise FileNotFoundError(f"{images} is not a folder of images (a statistics file must be named .npz)")
        source = _OnDisk(open_root(str(images)), size, crop)
    if len(source) < LEAST:
        found = f"{len(source)} {'images' if isinstance(images, Tensor) else 'in ' + str(images)}"
        raise InputError(f"at least {LEAST} images are needed (the Inception Score has ten splits), found {found}")
    return source


class Content:
    """A checksum of images as they were judged: of their pixels, one after another."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def add(self, images: Tensor) -> None:
        self._digest.update(images.numpy())

    def text(self) -> str:
        return self._digest.hexdigest()


def _one_size(shapes: Iterable[tuple[int, int]]) -> None:
    sizes = sorted(f"{height}x{width}" for height, width in set(shapes))
    if len(sizes) > 1:
        raise InputError(f"images must have one size, found {', '.join(sizes[:5])}; crop them as for training first")


def side_of(images: Images) -> int | None:
    """The side of square images in memory."""
    square = isinstance(images, Tensor) and images.ndim == 4 and images.shape[1] == images.shape[2]
    return int(images.shape[1]) if square else None
