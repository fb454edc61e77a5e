"""Checkpoints behind the training: it waits for the copy to host memory, and a thread of each rank writes.

    save:  [ gather | copy ]                 on the main thread of all ranks
    then              [ prepare | write | sync | rename | prune ]      on their writer threads, in order

The writers agree over a process group of their own, so that nothing of theirs meets a collective of the training. At
most IN_FLIGHT checkpoints are held in host memory; the next one waits for the oldest. A process that dies meanwhile
leaves a temporary folder, which the next run removes.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Collection
from concurrent.futures import Future, wait
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from pixelgen_fast.runs.checkpoint import CheckpointError, Content, Engine, describe, write
from pixelgen_fast.runs.ranks import Ranks

IN_FLIGHT = 2
# writers wait for the slowest disk; a lost rank is found by the training
_PATIENCE = timedelta(hours=1)
_CLOSING_SECONDS = 60.0


@dataclass(frozen=True)
class Saved:
    """What became of a checkpoint. waited, written: seconds that training waited for it, and that writing took.

    error: why it is not there.
    """

    nimg: int
    waited: float
    written: float
    error: CheckpointError | None = None


class Saver:
    """Writes the checkpoints of a run into one folder. All ranks make one, and call `save` alike.

    background: False writes before `save` returns, and holds no more than a file of it in memory.
    """

    def __init__(self, folder: Path, engine: Engine, *, keep: int, background: bool) -> None:
        self.folder, self.engine, self.keep, self.background = folder, engine, keep, background
        group = dist.new_group(backend="gloo", timeout=_PATIENCE) if engine.world > 1 else None
        self.team = Ranks(engine.rank, engine.world, group)
        self._pending: deque[Future[Saved]] = deque()
        self._jobs: queue.SimpleQueue[tuple[Future[Saved], Content, float] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def save(self, nimg: int, state: dict[str, Any], good: Collection[int] = ()) -> None:
        """Take the checkpoint of image `nimg`; state and good as `checkpoint.describe` has them."""
        begin = time.perf_counter()
        if len(self._pending) >= IN_FLIGHT:
            wait([self._pending[-IN_FLIGHT]])
        content = describe(self.folder, self.engine, nimg=nimg, state=state, keep=self.keep, good=good)
        future: Future[Saved] = Future()
        self._pending.append(future)
        if not self.background:
            _write(future, content, None, self.team)
            return
        content = replace(content, shards=list(content.shards))
        if self._thread is None:
            # a daemon: one that waits for a lost rank must not keep a process that ends
            self._thread = threading.Thread(target=self._work, name="checkpoints", daemon=True)
            self._thread.start()
        self._jobs.put((future, content, time.perf_counter() - begin))

    def poll(self) -> list[Saved]:
        """What has been finished since the last call, oldest first. What is no CheckpointError is raised here."""
        found = []
        while self._pending and self._pending[0].done():
            found.append(self._pending.popleft().result())
        return found

    def wait(self) -> list[Saved]:
        """`poll`, once every checkpoint is on disk or has failed."""
        wait(self._pending)
        return self.poll()

    def close(self) -> None:
        """End the writer. What it has is written first, but for what takes longer than a minute."""
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join(_CLOSING_SECONDS)
            self._thread = None

    def _work(self) -> None:
        while self._write_next():
            pass

    def _write_next(self) -> bool:
        """Write one, and forget it before waiting for the next: a checkpoint is large."""
        job = self._jobs.get()
        if job is not None:
            _write(*job, self.team)
        return job is not None


def _write(future: Future[Saved], content: Content, waited: float | None, team: Ranks) -> None:
    """waited: None where the training waits for all of it."""
    begin, error = time.perf_counter(), None
    try:
        write(content, team)
    except CheckpointError as failure:
        error = failure
    except BaseException as fault:  # raised by the training, which asks for the result
        future.set_exception(fault)
        return
    seconds = time.perf_counter() - begin
    future.set_result(Saved(content.nimg, seconds if waited is None else waited, seconds, error))
