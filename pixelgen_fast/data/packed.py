"""The packed form of a data set: images of one size, decoded ahead of time, read at their place in one file.

    images.npy  uint8 [N, S, S, 3]      labels.npy  integers [N]      classes.json  the class names, a list

Images are read, not mapped: a file that shrinks under a run is an error with a name, where a map would end the process
with SIGBUS.
"""

from __future__ import annotations

import json
import math
import tokenize
from pathlib import Path

import numpy as np

from pixelgen_fast.data.encoded import ppm
from pixelgen_fast.data.image_index import ImageIndex
from pixelgen_fast.data.storage import OpenFiles
from pixelgen_fast.errors import InputError

# numpy reads a header as Python source
_NO_HEADER = (ValueError, KeyError, EOFError, SyntaxError, tokenize.TokenError)
PACKED_FILES = ("images.npy", "labels.npy", "classes.json")


class PackedIndex(ImageIndex):
    """A packed folder. Raises InputError, naming the file, for one that is damaged or not as above."""

    def __init__(self, root: Path) -> None:
        self._file = root / "images.npy"
        shape, dtype, self._begin = _header(self._file)
        if dtype != np.uint8 or len(shape) != 4 or shape[1] != shape[2] or shape[3] != 3:
            raise InputError(f"{self._file} must be uint8 [N, S, S, 3], got {dtype} {list(shape)}: pack it again")
        self._need = self._begin + math.prod(shape)
        if self._file.stat().st_size < self._need:
            raise self._cut_short(shape[0])
        labels, classes = _labels(root / "labels.npy"), _classes(root / "classes.json")
        if labels.shape != shape[:1] or shape[0] == 0:
            raise InputError(f"{root} holds {shape[0]:,} images and {labels.size:,} labels: pack it again")
        if labels.min() < 0 or labels.max() >= len(classes):
            raise InputError(f"{root}/labels.npy goes to {labels.max()}, classes.json has {len(classes)}: pack again")
        self._open = OpenFiles(1)
        super().__init__(root, classes, labels, size=shape[1])

    def path(self, i: int) -> str:
        return f"{self._file}[{i}]"

    def holder(self, i: int) -> Path:
        return self._file

    def read(self, i: int) -> bytes:
        length = self.size * self.size * 3
        pixels = self._open.read(self._file, self._begin + i * length, length)
        if len(pixels) != length:
            raise self._cut_short(len(self))
        return ppm(self.size, self.size, pixels)

    def _cut_short(self, images: int) -> InputError:
        return InputError(
            f"{self._file} is cut short: it has {self._file.stat().st_size:,} bytes, and its {images:,} images need "
            f"{self._need:,}: copy or pack it again"
        )


def _header(path: Path) -> tuple[tuple[int, ...], np.dtype, int]:
    """(shape, dtype, where the numbers begin) of an .npy file in row order."""
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    with open(path, "rb") as file:
        try:
            shape, columns_first, dtype = readers[np.lib.format.read_magic(file)](file)
        except _NO_HEADER as error:
            raise InputError(f"{path} does not begin as an .npy file does ({error}): pack it again") from error
        if columns_first:
            raise InputError(f"{path} is in column order: pack it again")
        return shape, dtype, file.tell()


def _labels(path: Path) -> np.ndarray:
    shape, dtype, begin = _header(path)
    if not np.issubdtype(dtype, np.integer):
        raise InputError(f"{path} must hold integers, got {dtype}: pack it again")
    need, there = begin + math.prod(shape) * dtype.itemsize, path.stat().st_size
    if there != need:
        raise InputError(f"{path} has {there:,} bytes, and its {list(shape)} numbers need {need:,}: pack it again")
    return np.fromfile(path, dtype, offset=begin).reshape(shape)


def _classes(path: Path) -> list[str]:
    try:
        classes = json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}): pack it again") from error
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise InputError(f"{path} must be a list of class names: pack it again")
    return classes
