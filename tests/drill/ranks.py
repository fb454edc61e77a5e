"""Faults of two ranks under a launcher. One rank alone goes on afterwards."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from tests.drill.run import PATIENCE, STEPS, Lost, Run, children

LIMIT = 6  # seconds without a sign of life after which a rank is lost
LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "pixelgen_fast"]


@contextmanager
def under_a_launcher(run: Run, rng: random.Random) -> Iterator[tuple[subprocess.Popen, list[int]]]:
    """The launcher of two ranks and the ranks, at some moment of the run; all are gone afterwards."""
    words = [*LAUNCHER, *run.words, "train.micro_batch=2", f"run.rank_limit={LIMIT}"]
    with run.log.open("ab") as log:
        process = subprocess.Popen(words, stdout=log, stderr=log, start_new_session=True)
    ranks: list[int] = []
    try:
        metrics, rows = run.folder / "metrics.jsonl", rng.randrange(1, STEPS)
        while process.poll() is None and not (metrics.exists() and metrics.read_bytes().count(b"\n") >= rows):
            time.sleep(0.01)
        ranks += children(process.pid, b"pixelgen_fast")
        yield process, ranks
    finally:
        for pid in ranks:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait(process: subprocess.Popen) -> None:
    try:
        process.wait(PATIENCE)
    except subprocess.TimeoutExpired as hangs:
        raise Lost(f"two ranks hang for {PATIENCE:.0f} s") from hangs


def killed(run: Run, rng: random.Random) -> None:
    """One dies, and the launcher ends with the other."""
    with under_a_launcher(run, rng) as (process, ranks):
        if ranks:
            os.kill(rng.choice(ranks), signal.SIGKILL)
        wait(process)


def stopped(run: Run, rng: random.Random) -> None:
    """One stands still; the other says which, and ends. A launcher waits for the one, whom it asks to end."""
    with under_a_launcher(run, rng) as (_, ranks):
        if len(ranks) == 2:
            still, other = rng.sample(ranks, 2)
            os.kill(still, signal.SIGSTOP)
            end = time.monotonic() + PATIENCE
            while alive(other):
                if time.monotonic() > end:
                    raise Lost(f"a rank waits {PATIENCE:.0f} s for one that stands still")
                time.sleep(0.05)


def orphaned(run: Run, rng: random.Random) -> None:
    """The launcher is killed: its ranks save and end by themselves, and meanwhile own the folder."""
    with under_a_launcher(run, rng) as (process, ranks):
        process.kill()
        process.wait()
        end = time.monotonic() + PATIENCE
        while any(map(alive, ranks)):
            if time.monotonic() > end:
                raise Lost(f"ranks without a launcher go on for {PATIENCE:.0f} s")
            time.sleep(0.05)


def alive(pid: int) -> bool:
    """Whether a process is there, and no zombie."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except (OSError, IndexError):
        return False
