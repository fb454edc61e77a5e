"""Stopping in good order: a signal asks, the training loop answers.

A handler only notes the wish. The loop asks `any_rank` after each step, so all ranks stop at the same one, saves, and
exits with REQUEUE. A second SIGINT stops at once with KeyboardInterrupt.

Other processes: a forked child has the handlers too, but no loop to ask them, so in a child they restore the system's
default and take effect. A spawned child starts with Python's own handlers and would die of the Ctrl-C that the terminal
sends to the whole group: the loader starts its workers with SIGINT ignored.
Under torchrun, SIGTERM to the agent reaches every rank, which then has 30 seconds before SIGKILL.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from types import FrameType

import torch
import torch.distributed as dist

# sysexits.h EX_TEMPFAIL: stopped by a signal with everything saved; the same command goes on from there.
REQUEUE = 75
# a cluster's preemption, Ctrl-C, a terminal that goes away, SLURM's warning before the time limit (--signal=USR1@120)
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
# torchrun passes a Ctrl-C on to ranks that the terminal has told already: that echo is no second wish.
ECHO_SECONDS = 0.5


class StopRequest:
    """Context manager that turns the SIGNALS into a wish to stop. Main thread only (Python's own rule).

    SIGHUP stays ignored where it is already, as under `nohup`; a shell's background jobs ignore SIGINT, and are asked
    by it all the same.
    `name` is the signal's name once there has been one, else None. Handlers are put back at the end.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._interrupted: float | None = None
        self._pid = os.getpid()
        self._previous: dict[int, signal.Handlers] = {}

    def __enter__(self) -> StopRequest:
        self._pid = os.getpid()
        for number in SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @property
    def requested(self) -> bool:
        """Whether this process has been asked to stop."""
        return self.name is not None

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
        self.name = self.name or signal.Signals(number).name


def any_rank(wishes: Sequence[bool], group: dist.ProcessGroup | None = None) -> list[bool]:
    """For each wish, whether any rank has it; all ranks must call it, with as many.

    One rank alone answers at once; more of them reduce over `group`, best a gloo group on a GPU machine
    (`ZeroEngine.host_group`), since NCCL would make the host wait for the device.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) == 1:
        return list(wishes)
    device = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
    flags = torch.tensor(wishes, dtype=torch.int32, device=device)
    dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=group)
    return [bool(flag) for flag in flags.tolist()]
