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
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
from PIL import Image

from tests.drill import stages

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


def command(arguments: list[str], log: str, death: tuple[str, int] | None) -> None:
    """In a process of its own: the command line, its output in a file. death: in which stage, at which time."""
    with open(log, "ab", buffering=0) as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    if death is not None:
        stages.plant(*death)
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

    @property
    def words(self) -> list[str]:
        settings = [f"run.dir={self.folder}", f"data.root={self.data}", *SETTINGS, *self.settings]
        return ["train", str(CONFIG), *settings]

    def start(self, death: tuple[str, int] | None = None) -> BaseProcess:
        process = _forks.Process(target=command, args=(self.words, str(self.log), death))
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
            if self.end(self.start(), 0, MEND) == 0:
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
    """All tensors of the last checkpoint; no row of metrics may be double or out of order."""
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


def apart(a: dict[str, np.ndarray], b: dict[str, np.ndarray], tolerated: float) -> list[str]:
    """Names of tensors that are not the same, or apart by more than is tolerated of their norm."""

    def same(name: str) -> bool:
        x, y = a.get(name), b.get(name)
        if x is None or y is None or x.shape != y.shape:
            return False
        return np.array_equal(x, y) or float(np.linalg.norm(x - y)) <= tolerated * float(np.linalg.norm(y))

    return sorted(name for name in a.keys() | b.keys() if not same(name))


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


def kill_in_a_stage(run: Run, rng: random.Random) -> None:
    run.end(run.start((rng.choice(stages.STAGES), rng.randint(1, 3))), -signal.SIGKILL)


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
    """They vanish under a running process, which makes new ones."""
    process = run.start()
    run.wait_for(lambda: bool(run.checkpoints()), process)
    somewhere(run, process, rng)
    shutil.rmtree(run.folder / "checkpoints", ignore_errors=True)
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


def rank_killed(run: Run, rng: random.Random) -> None:
    """One of two ranks dies; the launcher ends with the other, and one rank alone goes on."""
    settings = ["train.micro_batch=2", "run.rank_limit=20"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    with run.log.open("ab") as log:
        process = subprocess.Popen(
            [*launcher, "pixelgen_fast", *run.words, *settings], stdout=log, stderr=log, start_new_session=True
        )
    try:
        metrics, rows = run.folder / "metrics.jsonl", rng.randrange(1, STEPS)
        while process.poll() is None and not (metrics.exists() and metrics.read_bytes().count(b"\n") >= rows):
            time.sleep(0.01)
        if ranks := children(process.pid, b"pixelgen_fast"):
            os.kill(rng.choice(ranks), signal.SIGKILL)
        process.wait(PATIENCE)
    except subprocess.TimeoutExpired as hangs:
        raise Lost(f"two ranks hang for {PATIENCE:.0f} s") from hangs
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def children(pid: int, word: bytes) -> list[int]:
    """Processes below a process in whose command line a word is."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdecimal() and int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1]) == pid:
                found += [int(entry.name)] * (word in (entry / "cmdline").read_bytes())
        except (OSError, ValueError, IndexError):
            continue
    return found


FAULTS: dict[str, tuple[Callable[[Run, random.Random], None], int]] = {
    "a rank of two killed": (rank_killed, 1),
    "killed anywhere": (kill, 4),
    "killed in a stage of a checkpoint": (kill_in_a_stage, 4),
    "stopped by a signal": (stop_by_signal, 3),
    "newest checkpoint damaged": (damaged_checkpoint, 3),
    "half a row of metrics": (half_a_row, 1),
    "no room for files": (full_disk, 2),
    "checkpoints deleted": (checkpoints_deleted, 1),
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
        # two ranks add in another order
        names = apart(weights(run), undisturbed, 1e-5 if FAULTS[name][0] is rank_killed else 0.0)
    except Lost as lost:
        return f"lost: {lost}"
    if names:
        return f"mismatched: {', '.join(names[:3])}"
    shutil.rmtree(place)
    return "survived"
