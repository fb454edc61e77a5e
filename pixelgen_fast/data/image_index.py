"""What every data set is to its readers: N images in a fixed order, `number -> (bytes, label)`.

Memory an image: 8 bytes of label; in folders and tars also its name below the root and 8 bytes, in tars 24 more.
"""

from __future__ import annotations

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import numpy as np

_AT_ONCE = 4096  # names, or sizes of files
_STAT_THREADS = 16  # a network file system takes its time for each file


class ImageIndex(ABC):
    """N images in a fixed order. Picklable, and safe to use in several processes and threads at once.

    kind: what the root is, in words. classes: class names, label k is classes[k]. labels: int64 [N]. size: the side in
    pixels when all images are known to be squares of one size, else None. kept: the file from which the same root is
    opened again at once, where there is one.
    """

    kind = "images"
    kept: Path | None = None

    def __init__(self, root: Path, classes: list[str], labels: np.ndarray, size: int | None = None) -> None:
        self.root, self.classes, self.labels, self.size = root, classes, labels.astype(np.int64), size

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def fingerprint(self) -> str:
        """A checksum of the images' names below the root, their order and classes; their contents are not read."""
        digest = hashlib.sha256(json.dumps([len(self), self.size, self.classes]).encode())
        digest.update(self.labels.tobytes())
        for place in self.places():
            digest.update(place)
        return digest.hexdigest()

    def label(self, i: int) -> int:
        """The label of image i, 0 <= i < N."""
        return int(self.labels[i])

    def damage(self, i: int, data: bytes) -> str | None:
        """Why the bytes that `read` gave of image i are not those that were written; None where nothing says so."""
        return None

    def checked(self) -> str | None:
        """What became of the checksums that are kept of the whole, in words; None where this kind keeps none."""
        return None

    def below_root(self, path: str | Path) -> bytes:
        """A path without the root before it, encoded."""
        return str(path).removeprefix(str(self.root)).encode("utf-8", "surrogateescape")

    def places(self) -> Iterator[bytes]:
        """`below_root` of `path` of each image."""
        return (self.below_root(self.path(i)) for i in range(len(self)))

    def stored_bytes(self) -> int:
        """Bytes that the images take where they are stored."""

        def bytes_of(first: int) -> int:
            return sum(os.stat(self.path(i)).st_size for i in range(first, min(first + _AT_ONCE, len(self))))

        with ThreadPoolExecutor(_STAT_THREADS) as pool:
            return sum(pool.map(bytes_of, range(0, len(self), _AT_ONCE)))

    @abstractmethod
    def path(self, i: int) -> str:
        """Where image i is, for people to read."""

    @abstractmethod
    def holder(self, i: int) -> Path:
        """The file or folder whose images are there or away together with image i."""

    @abstractmethod
    def read(self, i: int) -> bytes:
        """The encoded bytes of image i. Raises OSError when storage does not give them, InputError when the file of
        many images that holds it is not the whole file that was opened."""


class Names:
    """N strings in one block of bytes: a million paths pickle and copy as two arrays.

    block: uint8, all names in a row. ends: int64 [N], where each ends.
    """

    def __init__(self, names: Iterable[str]) -> None:
        encoded = [os.fsencode(name) for name in names]
        self.block = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        self.ends = np.cumsum([len(name) for name in encoded], dtype=np.int64)

    @classmethod
    def restored(cls, block: np.ndarray, ends: np.ndarray) -> Names:
        names = cls(())
        names.block, names.ends = block, ends
        return names

    def __getitem__(self, i: int) -> str:
        start = self.ends[i - 1] if i else 0
        return os.fsdecode(self.block[start : self.ends[i]].tobytes())

    def encoded(self) -> Iterator[bytes]:
        """All of them, in a tenth of the time of one by one."""
        begin = 0
        for first in range(0, len(self.ends), _AT_ONCE):
            ends = self.ends[first : first + _AT_ONCE].tolist()
            block, start = self.block[begin : ends[-1]].tobytes(), begin
            for end in ends:
                yield block[start - begin : end - begin]
                start = end
            begin = ends[-1]
