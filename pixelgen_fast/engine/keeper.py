"""When a run writes a checkpoint, and which of them is good.

None is written and none deleted while steps are bad (watch.py); what is due then is written after the next step that is
not. The newest one that is proven good is kept beside the newest `save.keep`. One that could not be written is said and
tried again.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pixelgen_fast import config as cfg
from pixelgen_fast.engine.collectives import any_rank
from pixelgen_fast.engine.memory import available_memory
from pixelgen_fast.engine.watch import Health, StepWatch
from pixelgen_fast.engine.zero import ZeroEngine
from pixelgen_fast.runs import checkpoint
from pixelgen_fast.runs.ranks import Ranks
from pixelgen_fast.runs.saver import IN_FLIGHT, Saved, Saver

RETRY_SECONDS = 30.0
LAST_RETRIES = (0.0, 1.0)  # seconds before each further try to write the last one, which no later one makes good

log = logging.getLogger(__name__)


class Keeper:
    """The checkpoints of one run. All ranks call its methods alike. say: takes a line for people."""

    def __init__(
        self, config: cfg.Config, engine: ZeroEngine, folder: Path, device: torch.device, say: Callable[[str], None]
    ) -> None:
        self.engine, self.folder, self.say = engine, folder, say
        # all ranks alike: those that write at once and those that do not would wait for each other
        short = any_rank([not has_memory(engine)], engine.host_group)[0] if config.save.background else True
        background = not short
        self.saver = Saver(folder, engine, keep=config.save.keep, background=background)
        self.max_bad_steps = config.train.max_bad_steps
        self.health, self.watch = Health(config.train.loss_range), StepWatch(device)
        self.saved: int | None = None  # image of the newest checkpoint on disk
        self._taken: set[int] = set()  # images of those in flight, which may turn out to be the good one
        self._origin: tuple[int, Path] | None = None  # what the run went on from
        self._retry_at = math.inf

    def resume(self, path: Path, nimg: int, state: dict[str, Any] | None, proven: bool = False) -> None:
        """Go on from the checkpoint of image `nimg`, in any folder. state: what it keeps of the losses. proven: it is
        known to be good."""
        self._origin = (nimg, path)
        for _ in self.watch.poll(wait=True):  # steps that are given up
            pass
        self.saved = nimg
        self.health.resume(state, nimg, proven)

    def step(self, losses: Tensor, first: int, last: int) -> None:
        """A step on images [first, last) has been made. losses: as `training_step` gives them."""
        self.watch.push(self.engine.skipped_in_a_row, losses, first, last)
        self._hear(self.saver.poll())
        self._look()

    @property
    def failing(self) -> bool:
        """Whether too many steps in a row were bad, as this rank knows."""
        return self.health.bad_in_a_row >= self.max_bad_steps

    @property
    def retrying(self) -> bool:
        """Whether it is time to try again what could not be written."""
        return time.monotonic() >= self._retry_at

    def save(self, nimg: int, state: dict[str, Any], last: bool) -> bool:
        """Write a checkpoint; returns whether it is on its way. last: whether it is awaited.

        Raises CheckpointError where the last one cannot be written, in several tries.
        """
        if last:
            self._hear(self.saver.wait())
        if self.saved == nimg:
            return True
        self._look(wait=True)
        if any_rank([self.health.bad_in_a_row > 0], self.engine.host_group)[0]:
            return False
        self._retry_at = math.inf
        failed = self._save(nimg, state, last)
        for pause in LAST_RETRIES if last else ():
            if failed:
                time.sleep(pause)
                failed = self._save(nimg, state, last)
        if last and failed:
            raise failed
        return True

    def _save(self, nimg: int, state: dict[str, Any], wait: bool) -> checkpoint.CheckpointError | None:
        """Begin to write a checkpoint, or write it; what is known to have failed."""
        self.saver.save(nimg, {**state, "health": self.health.state()}, self.health.kept | self._taken)
        self._taken.add(nimg)
        return self._hear(self.saver.wait() if wait or not self.saver.background else self.saver.poll())

    def retreat(self) -> Path | None:
        """The last good checkpoint on every rank, once the newer ones have been set aside; None for none."""
        self._hear(self.saver.wait())
        return Ranks(self.engine.rank, self.engine.world, self.engine.host_group).on_rank_zero(self._retreat)

    def _retreat(self) -> Path | None:
        good = -1 if self.health.good is None else self.health.good
        known = [(int(path.name), path) for path in checkpoint.checkpoints(self.folder)]
        known += [self._origin] if self._origin else []
        whole = [found for found in known if found[0] <= good and not checkpoint.damage(found[1])]
        nimg, path = max(whole, default=(None, None))
        for aside in checkpoint.set_aside(self.folder, nimg):
            self.say(f"{aside} was taken when the run was not known to be sound; it is not used again")
        return path

    def close(self) -> None:
        self.saver.close()

    def _look(self, wait: bool = False) -> None:
        for step in self.watch.poll(wait):
            if told := self.health.add(step):
                self.say(told)

    def _hear(self, finished: list[Saved]) -> checkpoint.CheckpointError | None:
        """Say what became of checkpoints; returns the error of the last one."""
        for one in finished:
            self._taken.discard(one.nimg)
            if one.error:
                self.say(f"no checkpoint at image {one.nimg:,}, it is tried again: {one.error}")
                self._retry_at = time.monotonic() + RETRY_SECONDS
                continue
            self.saved = one.nimg
            self.health.saved(one.nimg)
            self.say(
                f"checkpoint of image {one.nimg:,}: training waited {one.waited:.2f} s, writing it took "
                f"{one.written:.2f} s"
            )
        return finished[-1].error if finished else None


def has_memory(engine: ZeroEngine) -> bool:
    """Whether this host can hold the checkpoints that its ranks have in flight; a warning says where it cannot."""
    # as torchrun, DeepSpeed's launcher and srun have it
    names = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "SLURM_NTASKS_PER_NODE")
    here = next((os.environ[name] for name in names if os.environ.get(name, "").isdecimal()), "1")
    ranks = min(int(here), engine.world)
    needed, free = checkpoint.state_bytes(engine) * IN_FLIGHT * ranks // engine.world, available_memory()
    if free is None or needed <= free:
        return True
    log.warning(
        "save.background needs %.1f GB of host memory and %.1f GB are free: training waits for the disk instead",
        needed / 1e9, free / 1e9,
    )  # fmt: skip
    return False
