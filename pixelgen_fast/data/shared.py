"""Memory that processes share: what a reader process begins with, and the items of one of its tasks.

It is an anonymous file (memfd), so neither the size of /dev/shm nor a killed process matters to it: it is gone with the
last process that holds it. There is no lock: who may write is agreed upon by messages.

    0           8                       size of the data
    | counter   | encoded images, one behind the other | pickled lengths, geometry, indexes, found |
"""

from __future__ import annotations

import mmap
import os
import pickle
from collections.abc import Sequence
from multiprocessing.reduction import DupFd
from typing import Any

import numpy as np

from pixelgen_fast.data.source import Item
from pixelgen_fast.data.storage import ResourceError

_HEAD = 8
_LEAST = 2**16


class SharedMemory:
    """A block that grows to what it must hold. It travels to a process that is being started."""

    _file: int | None = None

    def __init__(self, file: int | None = None) -> None:
        self._file = os.memfd_create("pixelgen reader") if file is None else file
        self._map = mmap.mmap(-1, 1)
        self._fit(_LEAST)

    def __reduce__(self) -> tuple:
        return _received, (DupFd(self._file),)

    def __del__(self) -> None:
        if self._file is not None:
            os.close(self._file)

    @property
    def counter(self) -> int:
        """A number that the other process sees change."""
        return int.from_bytes(self._map[:_HEAD], "little")

    @counter.setter
    def counter(self, value: int) -> None:
        self._map[:_HEAD] = value.to_bytes(_HEAD, "little")

    @classmethod
    def holding(cls, what: Any) -> SharedMemory:
        """New memory with a pickled object, for `held`. Raises ResourceError without memory."""
        data, memory = pickle.dumps(what), cls()
        memory._fit(_HEAD + len(data))
        memory._map[_HEAD : _HEAD + len(data)] = data
        return memory

    def held(self) -> Any:
        """The object that `holding` put here."""
        self._fit(os.fstat(self._file).st_size)
        return pickle.loads(memoryview(self._map)[_HEAD:])

    def write(self, items: Sequence[Item], found: dict[int, str]) -> tuple[int, int]:
        """Put items and a reader's findings here; returns what `read` needs. Raises ResourceError without memory."""
        lengths = [item.data.nbytes for item in items]
        rest = pickle.dumps((lengths, [item.geometry for item in items], [item.index for item in items], found))
        begin = _HEAD + sum(lengths)
        self._fit(begin + len(rest))
        at = _HEAD
        for item in items:
            self._map[at : at + item.data.nbytes] = item.data.data
            at += item.data.nbytes
        self._map[begin : begin + len(rest)] = rest
        return begin, len(rest)

    def read(self, begin: int, size: int) -> tuple[list[Item], dict[int, str]]:
        """What was written. The items' data are views, good until the next `write` of the other process."""
        self._fit(begin + size)
        lengths, *columns, found = pickle.loads(self._map[begin : begin + size])
        ends = _HEAD + np.cumsum(lengths, dtype=np.int64)
        block = np.frombuffer(self._map, dtype=np.uint8)
        views = [block[end - length : end] for end, length in zip(ends.tolist(), lengths, strict=True)]
        return [Item(*parts) for parts in zip(views, *columns, strict=True)], found

    def _fit(self, size: int) -> None:
        if size <= len(self._map):
            return
        try:
            os.posix_fallocate(self._file, 0, size)
            self._map = mmap.mmap(self._file, os.fstat(self._file).st_size)
        except OSError as error:
            raise ResourceError(
                f"no memory for {size:,} bytes of a micro-batch ({error}): use fewer workers"
            ) from error


def _received(file: Any) -> SharedMemory:
    return SharedMemory(file.detach())
