"""The training loop. Progress is counted in images: a step takes images nimg .. nimg + global batch of the run.

Everything a step draws is a function of the image number, so a run that is stopped and started again, on any number of
ranks and at any ZeRO stage, goes on as if it had never stopped.
"""

from __future__ import annotations

import shutil
from contextlib import ExitStack, closing
from typing import Any

import torch

from pixelgen_fast import config as cfg
from pixelgen_fast import errors
from pixelgen_fast.data.dali import Loader
from pixelgen_fast.dino.kept import keep_dino
from pixelgen_fast.engine.assemble import assemble
from pixelgen_fast.engine.graph import capture
from pixelgen_fast.engine.report import Interval, Report
from pixelgen_fast.engine.schedule import learning_rate
from pixelgen_fast.engine.signals import REQUEUE, StopRequest, any_rank
from pixelgen_fast.engine.step import training_step
from pixelgen_fast.engine.watch import SkipWatch
from pixelgen_fast.runs import checkpoint
from pixelgen_fast.runs.owner import Owner

# what a checkpoint's tensors depend on, beside the section `model`
FIXED = (
    "data.image_size",
    "data.num_classes",
    "alignment.teacher",
    "alignment.layer",
    "alignment.projector",
    "alignment.projector_hidden",
)


class TrainingError(errors.UserError, RuntimeError):
    """The run cannot go on; the message says why and what is safe."""


class Trainer:
    """One process of a run: `Trainer(config).run()` trains to the end and returns the exit code.

    Raises before the first step when something does not fit: UserError for settings and data, FileNotFoundError for a
    missing root, CheckpointError for what cannot be resumed, TrainingError for a full disk.
    """

    def __init__(self, config: cfg.Config) -> None:
        self.config, self.parts = config, assemble(config)
        self.engine, self.folder, self.rank = self.parts.engine, self.parts.folder, self.parts.rank
        self.nimg, self.saved, self.seconds = 0, -1, 0.0
        self.owner = Owner(self.folder.root)
        with ExitStack() as on_failure:
            on_failure.callback(self.owner.close)
            self._claim()
            if config.train.cuda_graph:
                capture(self.parts.objective, config.train.micro_batch, config.data.image_size, self.parts.device)
            if self.rank == 0:
                keep_dino(self.folder.root, self.parts.built)
            self.report = Report(self.parts, self.nimg)
            self.order = self.parts.order(self.nimg)
            self.loader = Loader(self.parts.index, self.order, config.data, self.parts.device)
            on_failure.pop_all()
        self.micro_batches = 0
        self.watch = SkipWatch(self.parts.device)
        self.signals = StopRequest()

    def _claim(self) -> None:
        """Become the one run that writes the folder, and go on from what is there. A refused run makes none."""
        begun = self.folder.root.is_dir()
        if begun and self.rank == 0:
            self.owner.take()
        self._resume()
        self._check_folder()
        if not begun and self.rank == 0:
            self.owner.take()

    def run(self) -> int:
        """Train to the end, or until a signal; returns the exit code. Raises TrainingError where it makes no sense."""
        c, batch, total = self.config, self.config.train.global_batch, self.parts.total
        with closing(self.owner), self.signals, self.loader:
            errors.begin()
            interval = Interval(self.nimg, self.loader)
            while self.nimg < total:
                self.train_step()
                stop = self._should_stop()
                if crossed(self.nimg, batch, c.log.every_images) or self.nimg >= total:
                    self.seconds += self.report.row(self.nimg, interval, self.loader)
                    interval = Interval(self.nimg, self.loader)
                if stop or crossed(self.nimg, batch, c.save.every_images):
                    with interval.paused():
                        self._save(last=stop)
                if stop:
                    return self._stopped()
                if crossed(self.nimg, batch, c.sample.grid_every_images) and self.nimg < total:
                    with interval.paused():
                        self.report.grid(self.folder.samples(self.nimg), self.nimg)
            self._save(last=True)
            self.report.finish(self.nimg, self.seconds)
        return 0

    def train_step(self) -> None:
        """The step on the next images."""
        batch = self.config.train.global_batch
        self.engine.set_lr(learning_rate(self.config.optimizer, self.nimg, self.parts.total))
        numbers = range(self.micro_batches, self.micro_batches + self.order.accumulation)
        batches = [next(self.loader) for _ in numbers]
        losses = training_step(self.engine, self.parts.objective, batches, [self.order.first(q) for q in numbers])
        self.micro_batches, self.nimg = numbers.stop, self.nimg + batch
        self.report.add(batch, losses)
        self.watch.push(self.engine.skipped_in_a_row, self.nimg - batch, self.nimg)

    def _should_stop(self) -> bool:
        """Whether all ranks stop here: a signal to any of them, or too many steps in a row that were not finite."""
        in_a_row = 0
        for first, last, in_a_row in self.watch.poll():
            self.report.say(
                f"step on images {first:,} to {last:,} skipped: loss or gradient is not finite ({in_a_row} in a row)"
            )
        wishes = [self.signals.requested, in_a_row >= self.config.train.max_bad_steps]
        stop, failed = any_rank(wishes, self.engine.host_group)
        if failed:
            self.report.close()
            last = checkpoint.latest_valid(self.folder.checkpoints, self.engine.host_group)
            raise TrainingError(
                f"{self.config.train.max_bad_steps} steps in a row had a loss or gradient that is not finite, the last "
                f"at image {self.nimg:,}; the last good checkpoint is {last or 'none'}. Resume from it with a smaller "
                "optimizer.lr, a smaller optimizer.clip or train.precision=fp32"
            )
        return stop

    def _save(self, last: bool) -> None:
        """Write a checkpoint. One that cannot be written costs nothing yet: the run goes on, unless it ends here."""
        if self.saved == self.nimg:
            return
        state = {
            "config": cfg.to_dict(self.config),
            "classes": self.parts.classes,
            "data": self._data(),
            "seconds": self.seconds,
        }
        try:
            checkpoint.save(
                self.folder.checkpoints, self.engine, nimg=self.nimg, state=state, keep=self.config.save.keep
            )
        except checkpoint.CheckpointError as error:
            if last:
                raise
            self.report.say(f"no checkpoint at image {self.nimg:,}, the run goes on and tries again later: {error}")
            return
        self.saved = self.nimg

    def _data(self) -> dict[str, Any]:
        """What a checkpoint keeps of the data, to be compared on resuming."""
        return {"images": len(self.parts.index), "fingerprint": self.parts.index.fingerprint}

    def _resume(self) -> None:
        """Restore the newest valid checkpoint of run.resume or run.dir and say what came back."""
        source = self.config.run.resume
        group = self.engine.host_group
        own = checkpoint.latest_valid(self.folder.checkpoints, group)
        # What this run has saved itself is newer than what it once began from.
        path = own if own or not source else checkpoint.find(source, group)
        if path is None:
            if left := checkpoint.checkpoints(self.folder.checkpoints):
                raise checkpoint.CheckpointError(
                    f"all {len(left)} checkpoints in {self.folder.checkpoints} are damaged, the newest of image "
                    f"{int(left[0].name):,}; put a whole one there, name one in run.resume, or choose another run.dir "
                    "to begin anew"
                )
            return
        state = checkpoint.read_state(path)
        changed = differences(state["config"], cfg.to_dict(self.config))
        fixed = [key for key in changed if key.startswith("model.") or key in FIXED]
        if {*state["config"]["optimizer"]["ema"]} != {*self.config.optimizer.ema}:
            fixed.append("optimizer.ema")
        if fixed or state["classes"] != self.parts.classes:
            what = ", ".join(f"{key} ({changed[key]})" for key in fixed) or f"classes of {self.config.data.root}"
            raise cfg.ConfigError(
                f"{path} was trained with other settings: {what}; choose another run.dir, or change them back"
            )
        checkpoint.load(path, self.engine)
        self.nimg = self.saved = state["nimg"]
        self.seconds = state["seconds"]
        if self.rank == 0:
            print(
                f"resumed {path}: image {self.nimg:,} of {self.parts.total:,}, weights, optimizer moments and averages "
                f"{', '.join(str(d) for d in self.config.optimizer.ema)} restored"
            )
            for key, change in changed.items():
                print(f"  {key} has changed: {change}")
            if text := data_change(state.get("data"), self._data()):
                print(f"  {text}")

    def _check_folder(self) -> None:
        """Refuse to start a run that cannot write its folder, or whose checkpoints will not fit."""
        if self.rank:
            return
        root, keep = self.folder.root, self.config.save.keep
        for path in (root, self.folder.checkpoints, self.folder.tensorboard, self.folder.samples(0).parent):
            if path.exists() and not path.is_dir():
                raise TrainingError(
                    f"{path} is a file where the run keeps a folder; move it, or choose another run.dir"
                )
        root.mkdir(parents=True, exist_ok=True)
        numel = sum(torch.Size(shape).numel() for shape in self.engine.shapes.values())
        need = 4 * numel * (3 + len(self.config.optimizer.ema)) * (keep + 1)
        free = shutil.disk_usage(root).free
        if free < need:
            raise TrainingError(
                f"{root}: {keep} checkpoints and one being written need {need / 1e9:.1f} GB, "
                f"{free / 1e9:.1f} GB are free; free some, choose another run.dir or a smaller save.keep"
            )

    def _stopped(self) -> int:
        self.report.close()
        if self.rank == 0:
            print(f"stopped by a signal at image {self.nimg:,}, saved; the same command goes on from here")
        return REQUEUE


def crossed(nimg: int, batch: int, interval: int) -> bool:
    """Whether the step of `batch` images that ended at nimg reached a multiple of the interval (0: never)."""
    return interval > 0 and nimg // interval > (nimg - batch) // interval


def data_change(old: dict[str, Any] | None, new: dict[str, Any]) -> str:
    """What to say of data that are not those of the checkpoint; nothing where they are, or where it does not tell."""
    if not old or old == new:
        return ""
    counts = f"{old['images']:,} images -> {new['images']:,}"
    what = counts if old["images"] != new["images"] else f"{new['images']:,} images as before, with others among them"
    return f"the data have changed: {what}; image numbers mean other images than before"


def differences(old: dict, new: dict, prefix: str = "") -> dict[str, str]:
    """Dotted keys whose values differ between two configurations, with `old -> new`; run.* does not count."""
    changed: dict[str, str] = {}
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key, "not a setting"), new.get(key, "not a setting")
        if isinstance(a, dict) and isinstance(b, dict):
            changed |= {} if prefix == "" and key == "run" else differences(a, b, f"{prefix}{key}.")
        elif a != b:
            changed[f"{prefix}{key}"] = f"{a} -> {b}"
    return changed
