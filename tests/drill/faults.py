"""Faults in runs of real processes, each followed by the same command again: the weights must be those of a run that
nothing disturbed, bit for bit, and no row of metrics may be missing.

A fault is a function of a `Run` and random numbers: it starts the command, harms it or what it has written, and returns
when the process is gone.
"""

from __future__ import annotations

import ctypes
import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tests.drill import ranks, stages
from tests.drill.run import MEND, SAVED_BY_SIGNAL, STEPS, Lost, Run, apart, children, weights


def somewhere(run: Run, process: BaseProcess, rng: random.Random) -> None:
    """Wait for a moment of the run: at its start, or after some rows of metrics."""
    rows, metrics = rng.randrange(-3, STEPS), run.folder / "metrics.jsonl"
    if rows > 0:
        run.wait_for(lambda: metrics.exists() and metrics.read_bytes().count(b"\n") >= rows, process)
    time.sleep(rng.uniform(0.0, 0.3 if rows > 0 else 1.5))


def kill(run: Run, rng: random.Random) -> None:
    process = run.start()
    somewhere(run, process, rng)
    process.kill()
    run.end(process)


def kill_in_a_stage(run: Run, rng: random.Random) -> None:
    plant = partial(stages.plant, rng.choice(stages.STAGES), rng.randint(1, 3))
    run.end(run.start(plant), -signal.SIGKILL)


def stop_by_signal(run: Run, rng: random.Random) -> None:
    process = run.start()
    run.wait_for(lambda: (run.folder / "metrics.jsonl").exists(), process)
    somewhere(run, process, rng)
    if process.is_alive():
        os.kill(process.pid, rng.choice([signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1]))
    run.end(process, 0, SAVED_BY_SIGNAL)


def damaged_checkpoint(run: Run, rng: random.Random) -> None:
    """The newest one, of two at least, after a kill."""
    process = run.start()
    run.wait_for(lambda: len(run.checkpoints()) >= 2, process)
    process.kill()
    run.end(process)
    if len(run.checkpoints()) < 2:
        return
    harm(rng.choice(sorted(run.checkpoints()[-1].iterdir())), rng)


def harm(file: Path, rng: random.Random) -> None:
    """Flip a bit of a file, cut it, overwrite a part of it, remove it, or put a folder in its place."""
    data, how = bytearray(file.read_bytes()), rng.choice(["bit", "cut", "remove", "overwrite", "folder"])
    at = rng.randrange(len(data))
    if how == "bit":
        data[at] ^= 1 << rng.randrange(8)
    elif how == "cut":
        del data[at:]
    elif how == "overwrite":
        data[at : at + 64] = bytes(x ^ 0xFF for x in data[at : at + 64])
    file.unlink()
    if how == "folder":
        file.mkdir()
    elif how != "remove":
        file.write_bytes(data)


def half_a_row(run: Run, rng: random.Random) -> None:
    process = run.start()
    run.wait_for(lambda: bool(run.checkpoints()), process)
    process.kill()
    run.end(process)
    metrics = run.folder / "metrics.jsonl"
    if metrics.exists() and (data := metrics.read_bytes()):
        metrics.write_bytes(data[: rng.randrange(len(data))])


def full_disk(run: Run, rng: random.Random) -> None:
    """No file may grow for a while, or to the end: the run says so, or goes on without what did not fit."""
    process = run.start()
    run.wait_for(lambda: (run.folder / "metrics.jsonl").exists(), process)
    somewhere(run, process, rng)
    if process.is_alive():
        limits = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (rng.choice([0, 1000, 4096, 16_000]), limits[1]))
        process.join(rng.uniform(0.1, 1.5))
        if process.is_alive():
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, limits)
    run.end(process, 0, MEND)


def checkpoints_deleted(run: Run, rng: random.Random) -> None:
    """They vanish under a running process, all in one moment, and it makes new ones."""
    process = run.start()
    run.wait_for(lambda: bool(run.checkpoints()), process)
    somewhere(run, process, rng)
    gone = run.place / "gone"
    with suppress(FileNotFoundError):
        (run.folder / "checkpoints").rename(gone)
    shutil.rmtree(gone, ignore_errors=True)
    run.end(process, 0)


def data_away(run: Run, rng: random.Random) -> None:
    process, elsewhere = run.start(), run.place / "elsewhere"
    run.wait_for(lambda: (run.folder / "metrics.jsonl").exists(), process)
    run.data.rename(elsewhere)
    time.sleep(rng.uniform(0.1, 2.0))
    elsewhere.rename(run.data)
    run.end(process, 0)


def second_owner(run: Run, rng: random.Random) -> None:
    first = run.start()
    run.wait_for(lambda: (run.folder / "metrics.jsonl").exists(), first)
    second = run.start()
    while first.is_alive() and second.is_alive():
        time.sleep(0.01)
    # where the first was through before the second looked, the second finds a run that has ended
    beside = first.is_alive()
    run.end(second, *((MEND,) if beside else (0, MEND)))
    run.end(first, 0)


def reader_killed(run: Run, rng: random.Random) -> None:
    run.settings = ("data.workers=1",)
    process = run.start()
    readers: list[int] = []

    def there() -> bool:
        readers[:] = children(process.pid, b"spawn_main")
        return bool(readers)

    if run.wait_for(there, process):
        time.sleep(rng.uniform(0.0, 1.0))
        for pid in readers:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
    run.end(process, 0)


def obey_permissions() -> None:
    """Let go of root's right to pass over the permissions of files: CAP_DAC_OVERRIDE (bit 1) and _READ_SEARCH (2)."""
    libc, header = ctypes.CDLL(None, use_errno=True), (ctypes.c_uint32 * 2)(0x20080522, 0)
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; twice 32 bits
    libc.capget(header, sets)
    for i in range(3):
        sets[i] &= ~0b110
    if libc.capset(header, sets):
        raise OSError(ctypes.get_errno(), "capset")


def read_only(run: Run, rng: random.Random) -> None:
    """The run's folders take no new file for a while: what cannot be written is said and tried again."""
    process = run.start(obey_permissions)
    run.wait_for(lambda: (run.folder / "metrics.jsonl").exists(), process)
    somewhere(run, process, rng)
    folders = [path for path in (run.folder, run.folder / "checkpoints", run.folder / "samples") if path.is_dir()]
    for folder in folders:
        folder.chmod(0o555)
    process.join(rng.uniform(0.1, 1.5))
    for folder in folders:
        folder.chmod(0o755)
    run.end(process, 0, MEND)


def clock_jumps(run: Run, rng: random.Random) -> None:
    """The wall clock of the process moves by up to ten days, and again a while later; then a signal stops it."""
    process = run.start(partial(stages.plant_clock, rng.uniform(-1e6, 1e6), rng.uniform(-1e6, 1e6)))
    run.wait_for(lambda: (run.folder / "metrics.jsonl").exists(), process)
    somewhere(run, process, rng)
    if process.is_alive():
        os.kill(process.pid, signal.SIGTERM)
    run.end(process, 0, SAVED_BY_SIGNAL)


class Fault(NamedTuple):
    """weight: how often it is drawn beside the others. tolerated: apart from the undisturbed weights, relative, where
    two ranks add in another order. every_row: whether no row of metrics may be lost with it."""

    inject: Callable[[Run, random.Random], None]
    weight: int = 1
    tolerated: float = 0.0
    every_row: bool = True


FAULTS: dict[str, Fault] = {
    "a rank of two killed": Fault(ranks.killed, tolerated=1e-5),
    "a rank of two stopped": Fault(ranks.stopped, tolerated=1e-5),
    "the launcher of two ranks killed": Fault(ranks.orphaned, tolerated=1e-5),
    "killed anywhere": Fault(kill, 4),
    "killed in a stage of a checkpoint": Fault(kill_in_a_stage, 4),
    "stopped by a signal": Fault(stop_by_signal, 3),
    "newest checkpoint damaged": Fault(damaged_checkpoint, 3),
    "half a row of metrics": Fault(half_a_row, every_row=False),
    "no room for files": Fault(full_disk, 2, every_row=False),
    "folders read-only": Fault(read_only, every_row=False),
    "checkpoints deleted": Fault(checkpoints_deleted),
    "data away for up to 2 s": Fault(data_away),
    "a second run in the folder": Fault(second_owner),
    "reader killed": Fault(reader_killed),
    "the clock jumps": Fault(clock_jumps),
}


def outcome(name: str, seed: int, place: Path, undisturbed: dict[str, np.ndarray]) -> str:
    """ "survived", "lost: why" or "mismatched: what". The folder of a run that survived is removed."""
    run, fault = Run(place), FAULTS[name]
    try:
        fault.inject(run, random.Random(seed))
        run.finish()
        names = apart(weights(run, fault.every_row), undisturbed, fault.tolerated)
    except Lost as lost:
        return f"lost: {lost}"
    if names:
        return f"mismatched: {', '.join(names[:3])}"
    shutil.rmtree(place)
    return "survived"
