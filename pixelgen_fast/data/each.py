"""Every image of a data set once, in order, worked on by processes that read ahead.

    number -> encoded bytes -> work(number, bytes) -> bytes of a result, or the reason why there is none

The processes are the trainer's readers (readers.py): one that is killed or stands still is started again, and what
comes out is the same for any number of them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing

import numpy as np
from tqdm import tqdm

from pixelgen_fast.data.encoded import UnreadableImage
from pixelgen_fast.data.image_index import ImageIndex
from pixelgen_fast.data.order import Order
from pixelgen_fast.data.readers import InProcess, Readers
from pixelgen_fast.data.source import Item
from pixelgen_fast.data.storage import read_bytes, shortage
from pixelgen_fast.errors import InputError

Work = Callable[[int, bytes], bytes]
PATIENCE = 60.0  # seconds for which a data root that is away is waited for
_AHEAD = 3  # tasks of each process that are under way
_MOST, _MOST_BYTES = 32, 16 * 2**20  # images of a task, and bytes of its results
_FEW = 256  # images for which no processes are started unless they are asked for
_NO_GEOMETRY = np.zeros(0, np.float32)


def each(
    index: ImageIndex, work: Work, *, start: int = 0, workers: int | None = None, result_bytes: int = 1, title: str
) -> Iterator[tuple[int, np.ndarray | str]]:
    """(number, result uint8 [n] or reason) of images `start`, `start` + 1, ... A result is good until the next one.

    work: picklable; what it raises as UnreadableImage is the reason. workers: processes, 0 for this one; None takes one
    for each core that this process may use. result_bytes: about how many bytes a result has.
    Raises what else `work` raises, DataAway, and ResourceError; InputError for a negative number of workers.
    """
    if workers is None:
        cores = len(os.sched_getaffinity(0))
        workers = cores if cores > 1 and len(index) - start > _FEW else 0
    if workers < 0:
        raise InputError(f"workers {workers} must be at least 0")
    count = max(1, workers) * min(_MOST, max(1, _MOST_BYTES // result_bytes))
    order = Order(seed=0, global_batch=count, micro_batch=count, start=start)
    with closing(_begun(_Worked(index, work), order, workers)) as readers, _bar(index, start, title) as bar:
        for number in range(start, len(index), count):
            items, found = readers.next()
            for item in items[: len(index) - number]:
                yield item.index, found.get(item.index, item.data)
                bar.update()


def _begun(source: _Worked, order: Order, workers: int) -> InProcess | Readers:
    readers = (
        Readers(source, order, PATIENCE, count=workers, ahead=_AHEAD) if workers else InProcess(source, order, PATIENCE)
    )
    readers.begin(0)
    return readers


def _bar(index: ImageIndex, start: int, title: str) -> tqdm:
    return tqdm(total=len(index), initial=start, desc=title, unit="img", disable=None)


class _Worked:
    """What a reader process reads from: as source.Source, with the results of `work` in place of encoded images."""

    def __init__(self, index: ImageIndex, work: Work) -> None:
        self.index, self.work = index, work
        self.bad: set[int] = set()
        self.found: dict[int, str] = {}

    def items(self, numbers: Iterable[int]) -> Iterator[Item]:
        """The result of each number; an empty one where there is none, or no such image."""
        for i in numbers:
            result = self._result(i) if i < len(self.index) else b""
            yield Item(np.frombuffer(result, dtype=np.uint8), _NO_GEOMETRY, i)

    def _result(self, i: int) -> bytes:
        try:
            return self.work(i, read_bytes(self.index, i))
        except UnreadableImage as error:
            self.found[i] = str(error)
            return b""
        except MemoryError as error:
            raise shortage(f"cannot decode {self.index.path(i)}", error) from error
