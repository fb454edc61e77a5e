"""Runs a comparison: the teacher, the decoder, then every variant with every seed, each trained and judged by the usual
commands, at every checkpoint that it keeps.

Seeds come outermost, and the page is written after each, so that a comparison that is stopped has one of every variant
with the seeds that are whole. A run that has been judged is not made again; one that was stopped goes on. Each run is a
process of its own, so none inherits another's state.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import IO

from omegaconf import OmegaConf
from pixelgen_kernels.bodies import choose_body
from tqdm import tqdm

from pixelgen_fast import config as cfg
from pixelgen_fast import errors
from pixelgen_fast.compare.page import write_page
from pixelgen_fast.compare.schema import (
    JUDGED,
    PREPARED,
    Compare,
    fill,
    places,
    prepared_folder,
    run_config,
    run_folder,
)
from pixelgen_fast.engine.assemble import resolve_device
from pixelgen_fast.errors import UserError
from pixelgen_fast.runs.checkpoint import checkpoints
from pixelgen_fast.runs.folder import RunFolder
from pixelgen_fast.signals import REQUEUE, StopRequest


class CompareError(UserError, RuntimeError):
    """A run of the comparison failed; the message names it and shows its last words."""


def run(compare: Compare) -> Path | None:
    """Run what is missing and write the page after each seed; returns its path, or None when a signal stopped a run.

    Raises CompareError for a run that fails; what is finished stays. Raises ValueError, before the first one, for a
    device that is not there or a body of the operators that cannot run on it.
    """
    for variant in compare.variants:
        device, _ = resolve_device(run_config(compare, variant, compare.seeds[0]))
        choose_body(device.type)
    errors.begin()
    for what in PREPARED:
        if not _prepare(compare, what):
            return None
    page = None
    with tqdm(total=len(compare.seeds) * len(compare.variants), desc="compare", unit="run") as bar:
        for done, seed in enumerate(compare.seeds, 1):
            for variant in compare.variants:
                bar.set_postfix_str(f"{variant}, seed {seed}")
                if not _train_and_judge(compare, variant, seed):
                    return None
                bar.update()
            page = write_page(replace(compare, seeds=compare.seeds[:done]))
    return page


def _prepare(compare: Compare, what: str) -> bool:
    """Train the teacher or the decoder, where there is one and it is not there; False when a signal stopped it."""
    file, folder = getattr(compare, what), prepared_folder(compare, what)
    made = RunFolder(folder).evaluation if what == "decoder" else folder / what
    if file is None or made.exists():
        return True
    changes = fill(compare.prepared.get(what, {}), places(compare))
    own, log = Path(compare.dir) / f"{what}.yaml", Path(compare.dir) / f"{what}.log"
    own.parent.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(OmegaConf.merge(OmegaConf.load(file), changes, {"run": {"dir": str(folder)}}), own)
    commands = [[what, str(own)]]
    if what == "decoder":
        commands += [["latents", str(own)], ["evaluate", str(folder), "--samples", str(compare.samples)]]
    return all(_command(command, log) for command in commands)


def _train_and_judge(compare: Compare, variant: str, seed: int) -> bool:
    """One run, unless it has been judged; False when a signal stopped it."""
    folder = run_folder(compare, variant, seed)
    if RunFolder(folder).evaluation.is_file():
        return True
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "compare.yaml"
    file.write_text(cfg.to_yaml(run_config(compare, variant, seed)))
    if not _command(["train", str(file)], folder / "train.log"):
        return False
    *earlier, _ = sorted(int(path.name) for path in checkpoints(RunFolder(folder).checkpoints))
    for nimg in earlier:
        out = folder / JUDGED / f"{nimg}.json"
        out.parent.mkdir(exist_ok=True)
        if not out.is_file() and not _judge(compare, RunFolder(folder).checkpoints / f"{nimg:012d}", folder, out):
            return False
    return _judge(compare, folder, folder, RunFolder(folder).evaluation)


def _judge(compare: Compare, run: Path, folder: Path, out: Path) -> bool:
    command = ["evaluate", str(run), "--samples", str(compare.samples), "--out", str(out)]
    return _command(command, folder / "evaluate.log")


def _finished(command: list[str], out: IO[str]) -> int:
    """The exit code of a process; a signal to this one is passed on to it, so that it saves."""
    with StopRequest() as stop, subprocess.Popen(command, stdout=out, stderr=out) as process:
        told = False
        while True:
            try:
                return process.wait(timeout=0.2)
            except subprocess.TimeoutExpired:
                if stop.requested and not told:
                    process.terminate()
                    told = True


def _command(arguments: list[str], log: Path) -> bool:
    """Run `pixelgen ARGUMENTS` with its output in a file. False when a signal stopped it. Raises CompareError."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as out:
        code = _finished([sys.executable, "-m", "pixelgen_fast", *arguments], out)
    if code == REQUEUE:
        return False
    if code:
        last = "\n".join(log.read_text(errors="replace").splitlines()[-5:])
        raise CompareError(f"pixelgen {' '.join(arguments)} ended with code {code}; {log} ends with\n{last}")
    return True
