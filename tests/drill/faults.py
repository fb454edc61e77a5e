"""Faults in runs of real processes, each followed by the same command again: the weights must be those of a run that
nothing disturbed, bit for bit.

A fault is a function of a `Run` and random numbers: it starts the command, harms it or what it has written, and returns
when the process is gone. Processes are forked from one that has imported everything, so that a run takes seconds.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
from PIL import Image

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "digits.yaml"
SIZE, IMAGES, STEPS = 8, 24, 16
SETTINGS = (
    "data.num_classes=2", f"data.image_size={SIZE}", "model.hidden_size=16", "model.num_heads=2", "model.patch_depth=1",
    "model.pixel_depth=1", "model.pixel_hidden_size=8", "optimizer.warmup_images=0", f"train.images={4 * STEPS}",
    "train.global_batch=4", "train.micro_batch=4", "save.every_images=16", "save.keep=3", "log.every_images=4",
    "log.tensorboard=false", "sample.steps=1", "sample.grid_every_images=32", "sample.grid_classes=1",
    "sample.grid_per_class=1",
)  # fmt: skip
SAVED_BY_SIGNAL, MEND = 75, 2
AGAIN = 4  # times that the command is given again at most
PATIENCE = 120.0  # seconds after which a process that has not ended counts as hanging
_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(
    ["torch", "deepspeed", "nvidia.dali", "pixelgen_fast.cli", "pixelgen_fast.engine.trainer"]
)


class Lost(Exception):
    """The run did not come to its end, or said something else than it should."""


def command(arguments: list[str], log: str, largest_file: int | None) -> None:
    """In a process of its own: the command line, its output in a file."""
    with open(log, "ab", buffering=0) as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    if largest_file is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, resource.RLIM_INFINITY))
    from pixelgen_fast.cli import main

    sys.exit(main(arguments))


@dataclass
class Run:
    """One run in a folder of its own."""

    place: Path
    settings: tuple[str, ...] = ()
    log: Path = field(init=False)

    def __post_init__(self) -> None:
        self.folder, self.data, self.log = self.place / "run", self.place / "data", self.place / "log.txt"
        self.place.mkdir(parents=True, exist_ok=True)
        write_images(self.data)

    def start(self, largest_file: int | None = None) -> BaseProcess:
        words = [f"run.dir={self.folder}", f"data.root={self.data}", *SETTINGS, *self.settings]
        process = _forks.Process(target=command, args=(["train", str(CONFIG), *words], str(self.log), largest_file))
        process.start()
        return process

    def end(self, process: BaseProcess, *codes: int) -> int:
        """Wait for a process. Raises Lost where it hangs, or ends with none of the codes (where some are given)."""
        process.join(PATIENCE)
        if process.exitcode is None:
            process.kill()
            raise Lost(f"hangs for {PATIENCE:.0f} s")
        if codes and process.exitcode not in codes:
            raise Lost(f"exit code {process.exitcode} instead of {' or '.join(map(str, codes))}")
        return process.exitcode

    def finish(self) -> None:
        """Give the command again until it ends well."""
        for _ in range(AGAIN):
            if self.end(self.start()) == 0:
                return
        raise Lost(f"the command given {AGAIN} times does not come to its end: {self.said()}")

    def wait_for(self, seen: Callable[[], bool], process: BaseProcess) -> bool:
        """Until something is seen; False where the process ends before."""
        while process.is_alive():
            if seen():
                return True
            time.sleep(0.001)
        return False

    def checkpoints(self) -> list[Path]:
        folder = self.folder / "checkpoints"
        return sorted(p for p in folder.iterdir() if p.name.isdecimal()) if folder.is_dir() else []

    def said(self) -> str:
        return " ".join(self.log.read_text(errors="replace").split())[-300:]


def write_images(root: Path) -> None:
    """A small data set, the same every time."""
    numbers = np.random.default_rng(7)
    for i in range(IMAGES):
        path = root / f"class{i % 2}" / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(numbers.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)).save(path)


def weights(run: Run) -> dict[str, np.ndarray]:
    """All tensors of the last checkpoint; and the rows of metrics must be those of every step, once."""
    from safetensors.numpy import load_file

    last = run.checkpoints()[-1]
    if int(last.name) != 4 * STEPS:
        raise Lost(f"the last checkpoint is of image {last.name}")
    rows = [json.loads(line)["nimg"] for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    if rows != sorted(set(rows)):
        raise Lost(f"rows of metrics are double or out of order: {rows}")
    found: dict[str, np.ndarray] = {}
    for file in last.glob("*.safetensors"):
        found |= load_file(file)
    return found


def differing(run: Run, undisturbed: dict[str, np.ndarray]) -> list[str]:
    found = weights(run)
    names = found.keys() | undisturbed.keys()
    return sorted(
        n for n in names if n not in found or n not in undisturbed or not np.array_equal(found[n], undisturbed[n])
    )


# --- the faults ---


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


def kill_while_saving(run: Run, rng: random.Random) -> None:
    process, folder = run.start(), run.folder / "checkpoints"
    number, seen = rng.randrange(1, 4), set()

    def saving() -> bool:
        if folder.is_dir():
            seen.update(p.name for p in folder.iterdir() if p.name.startswith("tmp-"))
        return len(seen) >= number

    run.wait_for(saving, process)
    time.sleep(rng.expovariate(1 / 0.01))
    process.kill()
    run.end(process)


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
    file = rng.choice(sorted(p for p in run.checkpoints()[-1].iterdir()))
    data = bytearray(file.read_bytes())
    how = rng.choice(["bit", "cut", "remove", "zeros", "folder"])
    if how == "bit":
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        file.write_bytes(data)
    elif how == "cut":
        file.write_bytes(data[: rng.randrange(len(data))])
    elif how == "zeros":
        at = rng.randrange(len(data))
        part = len(data[at : at + 64])
        if data[at : at + part] == bytes(part):
            part = 0
        file.write_bytes(data[:at] + bytes(part) + data[at + part :])
    else:
        file.unlink()
        if how == "folder":
            file.mkdir()


def half_a_row(run: Run, rng: random.Random) -> None:
    process = run.start()
    run.wait_for(lambda: bool(run.checkpoints()), process)
    process.kill()
    run.end(process)
    metrics = run.folder / "metrics.jsonl"
    if metrics.exists() and (data := metrics.read_bytes()):
        metrics.write_bytes(data[: rng.randrange(len(data))])


def full_disk(run: Run, rng: random.Random) -> None:
    """No file may grow beyond some kilobytes; the run says so, or goes on without what did not fit."""
    process = run.start(largest_file=rng.choice([100, 1000, 4000, 16_000, 64_000]))
    run.end(process, 0, MEND)


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
    alone = not first.is_alive() and second.is_alive()  # the first was through before the second looked
    run.end(second, *((0, MEND) if alone else (MEND, 0)))
    run.end(first, 0)


def reader_killed(run: Run, rng: random.Random) -> None:
    run.settings = ("data.workers=1",)
    process = run.start()
    readers: list[int] = []

    def there() -> bool:
        readers[:] = children(process.pid)
        return bool(readers)

    if run.wait_for(there, process):
        time.sleep(rng.uniform(0.0, 1.0))
        for pid in readers:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
    run.end(process, 0)


def children(pid: int) -> list[int]:
    """Reader processes below a process: those that were spawned."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdecimal() and int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1]) == pid:
                words = (entry / "cmdline").read_bytes()
                if b"spawn_main" in words:
                    found.append(int(entry.name))
        except (OSError, ValueError, IndexError):
            continue
    return found


FAULTS: dict[str, tuple[Callable[[Run, random.Random], None], int]] = {
    "killed anywhere": (kill, 4),
    "killed while saving": (kill_while_saving, 3),
    "stopped by a signal": (stop_by_signal, 3),
    "newest checkpoint damaged": (damaged_checkpoint, 3),
    "half a row of metrics": (half_a_row, 1),
    "no room for files": (full_disk, 2),
    "data away for up to 2 s": (data_away, 1),
    "a second run in the folder": (second_owner, 1),
    "reader killed": (reader_killed, 1),
}  # the function, and how often beside the others


def outcome(name: str, seed: int, place: Path, undisturbed: dict[str, np.ndarray]) -> str:
    """ "survived", "lost: why" or "mismatched: what". The folder of a run that survived is removed."""
    run = Run(place)
    try:
        FAULTS[name][0](run, random.Random(seed))
        run.finish()
        names = differing(run, undisturbed)
    except Lost as lost:
        return f"lost: {lost}"
    if names:
        return f"mismatched: {', '.join(names[:3])}"
    shutil.rmtree(place)
    return "survived"
