"""Processes that read and prepare the items of micro-batches ahead of the training process.

Each reader has a pipe and its own shared memory and shares no lock with anyone, so that one that is killed at any
moment leaves nothing behind that another would wait for: the pipe's end is noticed, the reader is started again and
asked again for what it owed. A reader that stands still (a stopped process, a hung file system) is replaced in the same
way. What image stands where is a function of the numbers, so nothing of that shows in the batches.

    image j of micro-batch q is read by reader (q B + j) mod W, of W readers and B images a micro-batch
    micro-batch q lies in slot q mod A of each reader, of A slots
"""

from __future__ import annotations

import atexit
import logging
import multiprocessing
import pickle
import signal
import time
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from typing import NamedTuple

from pixelgen_fast.data.order import Order
from pixelgen_fast.data.shared import SharedMemory
from pixelgen_fast.data.source import Item, Source
from pixelgen_fast.data.storage import DataAway, ResourceError, patiently, shortage
from pixelgen_fast.errors import UserError

_MOST_DEATHS = 3  # of one reader at one task
_SILENCE = 120.0  # seconds without an image after which a reader is taken to stand still
_context = multiprocessing.get_context("spawn")
_log = logging.getLogger(__name__)


class InProcess:
    """The items of micro-batches, read in this process when they are asked for. patience, asked: see `patiently`."""

    def __init__(
        self, source: Source, order: Order, patience: float, asked: Callable[[], bool] = lambda: False
    ) -> None:
        self.source, self.order, self.patience, self.asked, self._batch = source, order, patience, asked, 0

    def begin(self, batch: int) -> None:
        """`next` gives micro-batch `batch`, and then those after it."""
        self._batch = batch

    def next(self) -> tuple[list[Item], dict[int, str]]:
        """The items of the next micro-batch, and index -> reason of images newly found to be unreadable."""
        numbers = self.order.numbers(self._batch)
        items = patiently(lambda: list(self.source.items(numbers)), self.patience, self.asked)
        found, self.source.found = self.source.found, {}
        self._batch += 1
        return items, found

    def close(self) -> None: ...


class Readers:
    """The same by `count` processes that read up to `ahead` micro-batches ahead.

    An item's data are good until the next call of `next`, which raises what reading raised, and ResourceError when a
    reader ends again and again.
    """

    def __init__(
        self,
        source: Source,
        order: Order,
        patience: float,
        asked: Callable[[], bool] = lambda: False,
        *,
        count: int,
        ahead: int,
    ) -> None:
        self.source, self.order, self.patience, self.asked, self.ahead = source, order, patience, asked, ahead
        self._batch = self._asked = 0
        self._readers: list[_Reader] = []
        # Called before the handler of multiprocessing, which waits for processes that nothing tells to end.
        atexit.register(_close, weakref.ref(self))
        # Not through a pipe, where a million names would wait for a process that may have been killed meanwhile.
        brief = SharedMemory.holding(source)
        for _ in range(count):
            self._readers.append(_Reader(source.bad, brief, ahead, asked))

    def begin(self, batch: int) -> None:
        """`next` gives micro-batch `batch`, and then those after it."""
        for reader in self._readers:
            reader.forget()
        self._batch = self._asked = batch

    def next(self) -> tuple[list[Item], dict[int, str]]:
        """See InProcess.next."""
        for batch in range(self._asked, self._batch + self.ahead):
            self._ask(batch)
        found: dict[int, str] = {}
        items: list[Item | None] = [None] * self.order.micro_batch
        for r, reader in enumerate(self._readers):
            if places := self._places(self._batch, r):
                part, news = patiently(reader.take, self.patience, self.asked)
                items[places.start :: places.step] = part
                found |= news
        self._batch += 1
        return items, found

    def close(self) -> None:
        """End the processes."""
        for reader in self._readers:
            reader.hang_up()
        for reader in self._readers:
            reader.stop()
        self._readers = []

    def __del__(self) -> None:
        self.close()

    def _ask(self, batch: int) -> None:
        numbers = self.order.numbers(batch)
        for r, reader in enumerate(self._readers):
            if places := self._places(batch, r):
                reader.ask(batch % self.ahead, numbers[places.start :: places.step])
        self._asked = batch + 1

    def _places(self, batch: int, reader: int) -> range:
        """The places of a micro-batch whose images the reader reads."""
        size, count = self.order.micro_batch, len(self._readers)
        return range((reader - batch * size) % count, size, count)


def _close(readers: weakref.ref[Readers]) -> None:
    if (alive := readers()) is not None:
        alive.close()


class _Task(NamedTuple):
    ticket: int
    slot: int
    numbers: range


class _Reader:
    """One process, as seen by the one that started it: asked for tasks, it gives their results in the same order."""

    def __init__(self, bad: set[int], brief: SharedMemory, slots: int, asked: Callable[[], bool]) -> None:
        self.bad, self.brief, self.asked = bad, brief, asked
        self.tickets = 0
        self.deaths = 0
        self.owed: deque[_Task] = deque()
        self.replies: dict[int, tuple[int, int] | Exception] = {}
        try:
            self.memory = [SharedMemory() for _ in range(slots)]
            self._start()
        except OSError as error:
            raise shortage("cannot start a reader process", error) or error from error

    def ask(self, slot: int, numbers: range) -> None:
        """Let the process put the items of image numbers into a slot whose last items are no longer in use."""
        self.owed.append(self._task(slot, numbers))
        self._send(self.owed[-1])

    def take(self) -> tuple[list[Item], dict[int, str]]:
        """The result of the oldest task. Raises what the process raised; after DataAway, call it again."""
        task = self.owed[0]
        while task.ticket not in self.replies:
            self._listen(task)
        reply = self.replies.pop(task.ticket)
        if isinstance(reply, DataAway):
            self.owed[0] = self._task(task.slot, task.numbers)
            self._send(self.owed[0])
        if isinstance(reply, Exception):
            raise reply
        self.owed.popleft()
        self.deaths = 0
        return self.memory[task.slot].read(*reply)

    def forget(self) -> None:
        """Give up all tasks, and tell the process which images are known to be unreadable."""
        self.owed.clear()
        self.replies.clear()
        self._send(frozenset(self.bad))

    def hang_up(self) -> None:
        """The process ends by itself when it next looks at its pipe."""
        self.pipe.close()

    def stop(self, patience: float = 1.0) -> None:
        self.hang_up()
        self.process.join(patience)
        self.process.kill()
        self.process.join(5.0)  # one that waits for storage may outlive even that

    def _start(self) -> None:
        self.pipe, theirs = _context.Pipe()
        self.process = _context.Process(target=_serve, args=(theirs, self.brief, self.memory), daemon=True)
        with signals_withheld():
            self.process.start()
        theirs.close()
        self._send(frozenset(self.bad))

    def _task(self, slot: int, numbers: range) -> _Task:
        self.tickets += 1
        return _Task(self.tickets, slot, numbers)

    def _send(self, message: _Task | frozenset[int]) -> None:
        with suppress(OSError):  # a process that has ended is found out by who waits for it
            self.pipe.send(message)

    def _listen(self, task: _Task) -> None:
        """Wait for one more reply; where none will come, start the process again."""
        counter, since = self.memory[0].counter, time.monotonic()
        try:
            while not self.pipe.poll(1.0):
                if self.memory[0].counter != counter:
                    counter, since = self.memory[0].counter, time.monotonic()
                elif self.asked():
                    raise DataAway("a reader process gave nothing, and the run was asked to stop")
                elif time.monotonic() - since > _SILENCE:
                    raise TimeoutError(f"gave nothing for {_SILENCE:.0f} s")
            ticket, reply = self.pipe.recv()
        except TimeoutError as error:
            self._restart(task, str(error))
        except (EOFError, OSError, pickle.UnpicklingError):
            self._restart(task, "")
        else:
            if any(ticket == owed.ticket for owed in self.owed):
                self.replies[ticket] = reply

    def _restart(self, task: _Task, why: str) -> None:
        self.stop(0.0 if why else 1.0)
        why = why or f"ended ({_ending(self.process.exitcode)})"
        self.deaths += 1
        if self.deaths > _MOST_DEATHS:
            raise ResourceError(
                f"a reader process {why}, {self.deaths} times at images {task.numbers[0]:,} to {task.numbers[-1]:,} of "
                "the run; where the system ends processes for lack of memory, use fewer data.workers"
            )
        _log.warning("a reader process %s and starts again; the batches stay the same", why)
        try:
            self._start()
        except OSError as error:
            raise shortage("cannot start a reader process again", error) or error from error
        for owed in self.owed:
            if owed.ticket not in self.replies:
                self._send(owed)


def _ending(code: int | None) -> str:
    return f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"


def _serve(pipe: Connection, brief: SharedMemory, memory: list[SharedMemory]) -> None:
    """The process: answers tasks until the other end of the pipe is closed, which it is when the trainer has ended."""
    source: Source = brief.held()
    with suppress(EOFError, ConnectionError):
        while True:
            message = pipe.recv()
            if isinstance(message, frozenset):
                source.bad.update(message)
                continue
            ticket, slot, numbers = message
            pipe.send((ticket, _reply(source, memory, slot, numbers)))


def _reply(source: Source, memory: list[SharedMemory], slot: int, numbers: range) -> tuple[int, int] | Exception:
    """Where in its slot the items' description lies, or why there are none."""
    items = []
    try:
        for item in source.items(numbers):
            items.append(item)
            memory[0].counter += 1
        found, source.found = source.found, {}
        return memory[slot].write(items, found)
    except UserError as error:
        return error
    except Exception as error:
        return RuntimeError(f"a reader process failed: {error!r}\n{traceback.format_exc()}")


@contextmanager
def signals_withheld() -> Iterator[None]:
    """Processes started inside never hear the signals that ask a run to stop, which go to a whole group of processes:
    they are for the trainer to handle. A blocked signal stays so in a new program; here it arrives afterwards.
    """
    resource_tracker.ensure_running()  # starting it later would unblock signals
    asking = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, asking)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
