"""A rank that is dead, stopped or stuck ends the run, and the others say which it was and what it did last.

Two threads of each rank go on while its training waits for the others. One beats: it writes where this rank is to the
store at which the ranks met (the launcher's, or rank 0's) and reads where all of them are. The other one judges, and
waits for nobody: when a rank is lost it says so and ends this process with errors.LOST; the launcher ends the rest.

An orphan, whose launcher was killed, asks itself to stop as SIGTERM does, so that it saves, and has `limit` seconds.

Cost: W ranks read W beats of 200 bytes each interval, limit / 60 seconds. A run of one process has no thread, but under
a launcher the one that watches it.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from types import TracebackType
from typing import Self

import torch.distributed as dist

from pixelgen_fast import errors, launcher
from pixelgen_fast.engine.group import meet
from pixelgen_fast.engine.roll import START, Beat, Roll
from pixelgen_fast.processes import WAITS_OUTSIDE, lineage, orphaned
from pixelgen_fast.signals import Stopped, StopRequest

BEATS = 60  # in `limit` seconds
# steps that compile and measure, and may take long; afterwards a part of a step has this many times the longest so far
FIRST_STEPS, SLOWER = 3, 20
LEAVE = 5.0  # seconds for the last words


class RankLost(errors.UserError, RuntimeError):
    """A rank is gone, and the others cannot go on without it; the message names it and what it did last."""

    code = errors.LOST


class Heartbeat:
    """Context manager around the work of a rank.

    limit: seconds without a sign of life after which a rank is lost. patience: seconds in which the slowest part of a
    run should end. store: where the ranks met, None in a run of one process. An error of communication inside becomes
    RankLost where a rank is found to be gone.
    """

    def __init__(self, limit: float = 60.0, patience: float = 1800.0) -> None:
        self.limit, self.patience, self.interval = limit, patience, limit / BEATS
        self.rank, self.world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        self.store: dist.Store | None = None
        self.roll = Roll(self.world, limit)
        self.beat = Beat(socket.gethostname(), os.getpid(), allowed=patience)
        self.own: BaseException | None = None  # an error that is known to be of no other rank
        self._lineage = lineage(os.environ)
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._threads: list[threading.Thread] = []
        self._step, self._steps, self._since, self._longest = 0, 0, time.monotonic(), 0.0
        self._rounds, self._cut_off, self._orphan = 0, 0.0, 0.0

    def __enter__(self) -> Self:
        work = [self._judge] if self._lineage or self.world > 1 else []
        self.store = meet(START * self.limit)
        if self.world > 1:
            work.append(self._converse)
        self._threads = [threading.Thread(target=function, name=WAITS_OUTSIDE, daemon=True) for function in work]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Tell the others how this rank ended. Raises RankLost in place of an error that a lost rank explains."""
        words = f"{type(error).__name__}: {error}" if error else ""
        found = ""
        if self.world > 1 and error is not self.own and _may_be_of_another_rank(error):
            if isinstance(error, Stopped):
                self.beat = replace(self.beat, ended=words)  # the others need not wait for this rank
            with StopRequest():  # a launcher that ends the rest is no wish to stop
                found = self.lost()
        self.beat = replace(self.beat, ended=found or words)
        self._ended.set()
        for thread in self._threads:
            thread.join(timeout=max(self.interval, LEAVE))
        if found:
            raise RankLost(found) from error

    def at(self, doing: str, patient: bool = True) -> None:
        """This rank has come to another part of the run; all ranks say so at the same places.

        patient: this part may take long even where it was short so far.
        """
        now = time.monotonic()
        if self._steps > FIRST_STEPS and self.beat.allowed < self.patience:
            self._longest = max(self._longest, now - self._since)
        measured = not patient and self._steps >= FIRST_STEPS
        allowed = min(self.patience, max(2 * self.limit, SLOWER * self._longest)) if measured else self.patience
        place = f"step {self._step:,} ({doing})" if self._steps else doing
        moves, position = self.beat.moves + 1, self.beat.position + 1
        self.beat = replace(self.beat, moves=moves, position=position, allowed=allowed, place=place)
        self._since = now

    def step(self, number: int) -> None:
        """A step begins, the one of this number."""
        self._step, self._steps = number, self._steps + 1

    def moved(self) -> None:
        """This rank gets on with what it does, alone."""
        self.beat = replace(self.beat, moves=self.beat.moves + 1)

    def lost(self) -> str:
        """Who is gone, after a collective has failed or a launcher ends the rest: looks for a few beats.

        Empty where everybody is there, or stopped in good order.
        """
        soon = min(self.limit, max(4 * self.interval, 1.0))
        end = time.monotonic() + 2 * soon
        while time.monotonic() < end:
            with self._lock:
                found = self.roll.silent(soon)
                if not found and self._cut_off > soon and not self._orphan:
                    found = self._store_is_gone()
                if found or self.roll.all_ended(self.rank):
                    break
            time.sleep(self.interval)
        return found or ("" if self.beat.ended else self.roll.failed())

    def _converse(self) -> None:
        """Beat and listen until the end; the last beat says how this rank ended."""
        store = dist.PrefixStore("heartbeat", self.store).clone()
        store.set_timeout(timedelta(seconds=self.limit))
        known: set[str] = set()
        last, ended = time.monotonic(), False
        while not self._orphan:  # its store has gone with the launcher
            # an error of the store is silence, which the judge counts
            with suppress(RuntimeError, OSError):
                beats = self._exchange(store, known)
                # a process that was stopped itself has not heard the others meanwhile
                now = time.monotonic()
                seconds, last = min(now - last, 2 * self.interval), now
                with self._lock:
                    for rank, text in enumerate(beats):
                        self.roll.hear(rank, text, seconds)
                    self._rounds += 1
            if ended:
                return
            ended = self._ended.wait(self.interval)

    def _exchange(self, store: dist.Store, known: set[str]) -> list[bytes | None]:
        """Write this rank's beat and read all; None for a rank that has not come. known: those that have, by number."""
        names = [str(rank) for rank in range(self.world)]
        store.set(names[self.rank], replace(self.beat, count=self._rounds + 1).to_json())
        known |= {name for name in names if name not in known and store.check([name])}
        heard = sorted(known)
        beats = dict(zip(heard, store.multi_get(heard), strict=True))
        return [beats.get(name) for name in names]

    def _judge(self) -> None:
        rounds, seconds = 0, min(1.0, self.interval)
        while not self._ended.wait(seconds):
            if self._orphan or orphaned(self._lineage):
                self._end_in_order(seconds)
                continue
            with self._lock:
                self._cut_off = self._cut_off + seconds if self.world > 1 and rounds == self._rounds else 0.0
                rounds = self._rounds
                found = self.roll.silent(self.limit) or self.roll.stuck()
                if not found and self._cut_off > self.limit:
                    found = self._store_is_gone()
            if found:
                _end_process(found)

    def _end_in_order(self, seconds: float) -> None:
        """Ask this process to stop, as its launcher would; when `limit` seconds have gone by, end it."""
        if not self._orphan:
            os.kill(os.getpid(), signal.SIGTERM)
        self._orphan += seconds
        if self._orphan > self.limit:
            _end_process(f"the launcher of {self.roll.describe(self.rank)} is gone, in {self.beat.place}")

    def _store_is_gone(self) -> str:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        if self._lineage:
            who = "the launcher"
        else:
            beat = self.roll.peers[0].beat
            who = self.roll.describe(0) + (f", last in {beat.place}," if beat else "")
        return f"{who} keeps the store at {where} and has not answered for {self._cut_off:.0f} s"


def _may_be_of_another_rank(error: BaseException | None) -> bool:
    """Whether an error can come of another rank's end: a collective that failed, or a launcher that ends the rest."""
    return isinstance(error, Stopped) or (isinstance(error, RuntimeError) and not isinstance(error, errors.UserError))


def _end_process(message: str) -> None:
    print(f"\n{errors.line(RankLost(message))}", file=sys.stderr, flush=True)
    launcher.leave(errors.LOST)
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(errors.LOST)
