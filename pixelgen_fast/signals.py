"""Stopping in good order: signals ask, and there are two ways to answer.

StopAtOnce    raises Stopped at the next line of Python: start-up, sampling, evaluation, whatever keeps what it has done
StopRequest   notes the wish only; the training loop asks after each step, saves, and exits with REQUEUE

A command runs in the first, and its training loop in the second, inside it. A second SIGINT stops at once with
KeyboardInterrupt.

Other processes: a forked child has the handlers too, but nobody to ask them, so in a child they restore the system's
default and take effect. A spawned child starts with Python's own handlers and would die of the signal that a terminal
or a cluster sends to the whole group: the loader starts its readers with the SIGNALS blocked.
Under torchrun, SIGTERM to the agent reaches every rank, which then has 30 seconds before SIGKILL.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType
from typing import Self

# sysexits.h EX_TEMPFAIL: stopped by a signal with everything saved; the same command goes on from there.
REQUEUE = 75
# a cluster's preemption, Ctrl-C, a terminal that goes away, SLURM's warning before the time limit (--signal=USR1@120)
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
# torchrun passes a Ctrl-C on to ranks that the terminal has told already: that echo is no second wish.
ECHO_SECONDS = 0.5


class Stopped(BaseException):
    """A signal ended the work, `str(stopped)` is its name. Like KeyboardInterrupt, it passes `except Exception`."""


class StopRequest:
    """Context manager that turns the SIGNALS into a wish to stop. In other threads than the main one it hears none.

    SIGHUP stays ignored where it is already, as under `nohup`; a shell's background jobs ignore SIGINT, and are asked
    by it all the same.
    `name` is the signal's name once there has been one, else None. Handlers are put back at the end.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._interrupted: float | None = None
        self._pid = os.getpid()
        self._previous: dict[int, signal.Handlers] = {}

    def __enter__(self) -> Self:
        self._pid = os.getpid()
        for number in SIGNALS if threading.current_thread() is threading.main_thread() else ():
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue
            self._previous[number] = signal.signal(number, self._note)
            around = getattr(self._previous[number], "__self__", None)
            if isinstance(around, StopRequest) and around.requested:
                self.ask(around.name)  # somebody's code has swallowed Stopped
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @property
    def requested(self) -> bool:
        """Whether this process has been asked to stop."""
        return self.name is not None

    def ask(self, name: str) -> None:
        """Ask without a signal; name: what stands in its place."""
        self.name = self.name or name

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        if number == signal.SIGINT:
            now = time.monotonic()
            if self._interrupted is not None and now - self._interrupted > ECHO_SECONDS:
                raise KeyboardInterrupt
            self._interrupted = self._interrupted or now
        self.ask(signal.Signals(number).name)


class StopAtOnce(StopRequest):
    """Context manager in which the first of the SIGNALS raises Stopped, so that files are closed and locks given up."""

    def _note(self, number: int, frame: FrameType | None) -> None:
        first = not self.requested
        super()._note(number, frame)
        if first and self.requested:
            raise Stopped(self.name)
