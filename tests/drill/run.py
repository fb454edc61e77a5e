"""A run of real processes for the drill, and what is left of it at the end.

Processes are forked from one that has imported everything, so that a run takes seconds.
"""

from __future__ import annotations

import json
import multiprocessing
import os
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


def command(arguments: list[str], log: str, plant: Callable[[], object] | None) -> None:
    """In a process of its own: the command line, its output in a file. plant: called first, there."""
    with open(log, "ab", buffering=0) as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup has it ignored
    if plant is not None:
        plant()
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

    def start(self, plant: Callable[[], object] | None = None) -> BaseProcess:
        """The command in a process of its own. plant: called there before it, picklable."""
        process = _forks.Process(target=command, args=(self.words, str(self.log), plant))
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


def weights(run: Run, every_row: bool = True) -> dict[str, np.ndarray]:
    """All tensors of the last checkpoint; no row of metrics may be double or out of order, or missing (every_row)."""
    from safetensors.numpy import load_file

    last = run.checkpoints()[-1]
    if int(last.name) != 4 * STEPS:
        raise Lost(f"the last checkpoint is of image {last.name}")
    rows = [json.loads(line)["nimg"] for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    if rows != sorted(set(rows)):
        raise Lost(f"rows of metrics are double or out of order: {rows}")
    if every_row and rows != [4 * step for step in range(1, STEPS + 1)]:
        raise Lost(f"rows of metrics are missing: there are {rows}")
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
