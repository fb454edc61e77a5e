"""The packed form of a data set: images of one size, decoded ahead of time, read at their place in one file.

    images.npy  uint8 [N, S, S, 3]      labels.npy  integers [N]      classes.json  the class names, a list
    manifest.json, checksums.npy  see manifest.py; folders of earlier versions have none

Images are read, not mapped: a file that shrinks under a run is an error with a name, where a map would end the process
with SIGBUS.
"""

from __future__ import annotations

import json
import math
import tokenize
import zlib
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import numpy as np

from pixelgen_fast.data.encoded import ppm
from pixelgen_fast.data.image_index import ImageIndex
from pixelgen_fast.data.manifest import CHECKSUMS, Manifest
from pixelgen_fast.data.storage import OpenFiles
from pixelgen_fast.errors import InputError

# numpy reads a header as Python source
_NO_HEADER = (ValueError, KeyError, EOFError, SyntaxError, tokenize.TokenError)
PACKED_FILES = ("images.npy", "labels.npy", "classes.json")


class PackedIndex(ImageIndex):
    """A packed folder. Raises InputError, naming the file, for one that is damaged or not as above."""

    kind = "a packed folder"

    def __init__(self, root: Path) -> None:
        self._file = root / "images.npy"
        shape, dtype, self._begin = _header(self._file)
        if dtype != np.uint8 or len(shape) != 4 or shape[1] != shape[2] or shape[3] != 3:
            raise InputError(f"{self._file} must be uint8 [N, S, S, 3], got {dtype} {list(shape)}: pack it again")
        self._need = self._begin + math.prod(shape)
        if self._file.stat().st_size < self._need:
            raise self._cut_short(shape[0])
        labels, classes = _integers(root / "labels.npy", shape[0]), _classes(root / "classes.json")
        if not shape[0]:
            raise InputError(f"{root} holds no images: pack it again")
        if labels.min() < 0 or labels.max() >= len(classes):
            raise InputError(f"{root}/labels.npy goes to {labels.max()}, classes.json has {len(classes)}: pack again")
        self._open = OpenFiles(1)
        super().__init__(root, classes, labels, size=shape[1])

    def path(self, i: int) -> str:
        return f"{self._file}[{i}]"

    def places(self) -> Iterator[bytes]:
        file = self.below_root(self._file)
        return (b"%s[%d]" % (file, i) for i in range(len(self)))

    def stored_bytes(self) -> int:
        return self._need - self._begin

    def holder(self, i: int) -> Path:
        return self._file

    def read(self, i: int) -> bytes:
        length = self.size * self.size * 3
        pixels = self._open.read(self._file, self._begin + i * length, length)
        if len(pixels) != length:
            raise self._cut_short(len(self))
        return ppm(self.size, self.size, pixels)

    def damage(self, i: int, data: bytes) -> str | None:
        if self._checksums is None or zlib.crc32(data[-self.size * self.size * 3 :]) == self._checksums[i]:
            return None
        return "its pixels are not those that were packed (CRC-32): copy the folder again, or pack it again"

    def checked(self) -> str | None:
        if (manifest := Manifest.read(self.root)) is None:
            return "none: an earlier version packed this folder"
        if names := manifest.differing(self.root):
            return f"{', '.join(names)} differ from what was packed: copy the folder again, or pack it again"
        return f"{', '.join(manifest.files)} are as packed; those of images are compared one by one"

    @cached_property
    def _checksums(self) -> np.ndarray | None:
        """uint32 [N] where they are kept."""
        path = self.root / CHECKSUMS
        return _integers(path, len(self)) if path.exists() else None

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


def _integers(path: Path, images: int) -> np.ndarray:
    """The integers [images] of a file."""
    shape, dtype, begin = _header(path)
    if not np.issubdtype(dtype, np.integer):
        raise InputError(f"{path} must hold integers, got {dtype}: pack it again")
    need, there = begin + math.prod(shape) * dtype.itemsize, path.stat().st_size
    if there != need:
        raise InputError(f"{path} has {there:,} bytes, and its {list(shape)} numbers need {need:,}: pack it again")
    if shape != (images,):
        raise InputError(f"{path.parent} holds {images:,} images and {math.prod(shape):,} {path.stem}: pack it again")
    return np.fromfile(path, dtype, offset=begin)


def _classes(path: Path) -> list[str]:
    try:
        classes = json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}): pack it again") from error
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise InputError(f"{path} must be a list of class names: pack it again")
    return classes
