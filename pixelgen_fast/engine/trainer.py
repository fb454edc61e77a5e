"""The training loop. Progress is counted in images: a step takes images nimg .. nimg + global batch of the run.

Everything a step draws is a function of the image number, so a run that is stopped and started again, on any number of
ranks and at any ZeRO stage, goes on as if it had never stopped.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from pixelgen_fast import config as cfg
from pixelgen_fast import errors
from pixelgen_fast.data import Batch
from pixelgen_fast.data.dali import Loader
from pixelgen_fast.data.order import RULE
from pixelgen_fast.engine.assemble import Parts, assemble
from pixelgen_fast.engine.changes import averages, data_changes, differences, held_changes, read_config, with_defaults
from pixelgen_fast.engine.collectives import any_rank
from pixelgen_fast.engine.feed import Feed
from pixelgen_fast.engine.graph import capture
from pixelgen_fast.engine.heartbeat import Heartbeat
from pixelgen_fast.engine.keeper import Keeper
from pixelgen_fast.engine.report import Interval, Report
from pixelgen_fast.engine.schedule import learning_rate
from pixelgen_fast.engine.step import training_step
from pixelgen_fast.engine.validation import Validation
from pixelgen_fast.runs import checkpoint
from pixelgen_fast.runs.export import published_in
from pixelgen_fast.runs.folder import PUBLISHED
from pixelgen_fast.runs.kept import keep
from pixelgen_fast.runs.owner import Owner
from pixelgen_fast.signals import REQUEUE, StopRequest

# what a checkpoint's tensors depend on, beside the section `model`
FIXED = (
    "data.image_size",
    "data.num_classes",
    "alignment.teacher",
    "alignment.layer",
    "alignment.projector",
    "alignment.projector_hidden",
    "optimizer.name",
)


# what decides which pictures the losses are of
PICTURED = ("data.root", "data.crop", "data.flip", "data.image_size", "data.class_balanced")


class TrainingError(errors.UserError, RuntimeError):
    """The run cannot go on; the message says why and what is safe."""


class Trainer:
    """One process of a run: `Trainer(config).run()` trains to the end and returns the exit code.

    What trains something else than a generator is a subclass: `assemble`, `prepare`, `new_report` and `learn` are its
    own, and so are the settings that its checkpoints' tensors depend on, whole sections or single ones.
    Raises before the first step when something does not fit: UserError for settings and data, FileNotFoundError for a
    missing root, CheckpointError for what cannot be resumed, TrainingError for a full disk.
    """

    fixed_sections: ClassVar[tuple[str, ...]] = ("model.",)
    fixed: ClassVar[tuple[str, ...]] = FIXED
    # what a checkpoint's configuration is read by
    read_config: ClassVar[Callable[[dict[str, Any]], Any]] = staticmethod(read_config)

    def __init__(self, config: cfg.Config, heart: Heartbeat | None = None) -> None:
        """heart: of this rank, beating; None in a run of one process."""
        self.heart = heart or Heartbeat()
        self.config = config
        self.parts = self.assemble()
        self.engine, self.folder, self.rank = self.parts.engine, self.parts.folder, self.parts.rank
        self.nimg, self.seconds, self.returns, self.due = 0, 0.0, 0, False
        self.published = self.parts.published
        self.keeper = Keeper(config, self.engine, self.folder.checkpoints, self.parts.device, self._say)
        self.signals = StopRequest()
        self.owner = Owner(self.folder.root)
        with ExitStack() as on_failure:
            on_failure.callback(self.owner.close)
            self.heart.at("reading the last checkpoint")
            self._claim()
            self.prepare()
            self.heart.at("reading the images that are held out")
            self.validation = Validation(self.parts) if self.parts.held is not None else None
            self.heart.at("starting the report and the loader")
            self._begin()
            on_failure.pop_all()

    def assemble(self) -> Parts:
        """The parts of the run."""
        return assemble(self.config, self.heart)

    def prepare(self) -> None:
        """What is to be done once the folder is this run's."""
        train = self.config.train
        if train.cuda_graph:
            capture(self.parts.objective, train.micro_batch, self.config.data.image_size, self.parts.device)
        if self.rank == 0:
            keep(self.folder.root, self.parts.built)

    def read_as(self) -> cfg.Data:
        """How the loader gives images."""
        return self.config.data

    def new_report(self, before: Report | None) -> Report:
        """What reports from the present image on. before: the report up to a return."""
        return Report(self.parts, self.nimg, self.returns, before)

    def learn(
        self, batches: Sequence[Batch], first: Sequence[int], share: float, at: Callable[[str], object]
    ) -> Tensor:
        """The optimizer step on the next images, at `share` of the scheduled rate; returns as `training_step` does.

        first: number of the first image of each micro-batch. at: told which part of the step begins.
        """
        self.engine.set_lr(share * learning_rate(self.config.optimizer, self.nimg, self.parts.total))
        return training_step(self.engine, self.parts.objective, batches, first, at)

    def _say(self, text: str) -> None:
        self.report.say(text)

    def _begin(self, before: Report | None = None) -> None:
        """What counts from the present image on. before: the report up to a return."""
        self.report = self.new_report(before)
        self.order = self.parts.order(self.nimg)
        self.loader = Loader(self.parts.index, self.order, self.read_as(), self.parts.device, asked=self._asked)
        self.feed = Feed(self.loader, self.order)

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
        with closing(self.owner), self.signals, closing(self.keeper):
            errors.begin()
            while (code := self._train()) is None:
                self._go_back()
        return code

    def _train(self) -> int | None:
        """The loop; None where the run is to go back to its last good checkpoint."""
        c, batch, total = self.config, self.config.train.global_batch, self.parts.total
        with self.loader:
            if not self._draw_missing_grid():
                return self._stopped()
            interval = Interval(self.nimg, self.loader)
            while self.nimg < total:
                self.train_step()
                stop, failed, again, unread = self._wishes()
                if failed and self.returns < c.train.returns:
                    return None
                if failed:
                    raise self._failed()
                if unread and not stop:
                    raise self._unread() from self.feed.error
                if crossed(self.nimg, batch, c.log.every_images) or self.nimg >= total:
                    self.heart.at("writing metrics")
                    self.seconds += self.report.row(self.nimg, interval, self.loader)
                    interval = Interval(self.nimg, self.loader)
                self._validate(interval)
                self.due = self.due or again or crossed(self.nimg, batch, c.save.every_images)
                if stop or (self.due and self.nimg < total):
                    with interval.paused("saving_seconds"):
                        self._save(last=stop)
                if stop:
                    return self._stopped()
                if self._grid_is_due():
                    with interval.paused("drawing_seconds"):
                        drawn = self._grid()
                    if not drawn:
                        return self._stopped()
            if not self._save(last=True):
                if self.returns < c.train.returns:
                    return None
                raise self._failed()
            self.heart.at("drawing the last grid")
            done = self.report.finish(self.nimg, self.seconds, self._asked)
        return 0 if done else self._stopped()

    def train_step(self) -> None:
        """The step on the next images."""
        batch, share = self.config.train.global_batch, self.config.train.return_lr**self.returns
        self.heart.step(self.nimg // batch + 1)
        self.heart.at("waiting for images")
        batches, first = self.feed.take()
        losses = self.learn(batches, first, share, partial(self.heart.at, patient=False))
        self.nimg += batch
        self.report.add(batch, losses)
        self.keeper.step(losses, self.nimg - batch, self.nimg)
        if self.nimg < self.parts.total:
            self.heart.at("waiting for images")
            self.feed.fetch()

    def _wishes(self) -> list[bool]:
        """Of any rank: to stop here, to give up after too many bad steps in a row, to try a checkpoint again, to end
        because it has no batches for the next step."""
        self.heart.at("agreeing to go on", patient=False)
        keeper, unread = self.keeper, self.feed.error is not None
        wishes = [self.signals.requested, keeper.failing, keeper.retrying, unread]
        return any_rank(wishes, self.engine.host_group)

    def _failed(self) -> TrainingError:
        """What ends a run whose steps are bad."""
        self.heart.at("looking for the last good checkpoint")
        good, limit = self.keeper.retreat(), self.config.train.loss_range
        self.report.close()
        far = "" if limit is None else f", or far above the mean of the loss (train.loss_range={limit:g})"
        return TrainingError(
            f"{self.keeper.health.bad_in_a_row} steps in a row had a loss or gradient that is not finite{far}, the "
            f"last at image {self.nimg:,}; the last good checkpoint is {good or 'none'}. Resume from it with a "
            "smaller optimizer.lr, a smaller optimizer.clip or train.precision=fp32"
        )

    def _unread(self) -> Exception:
        """Save, and say what ends a run of which a rank has no batches for the next step."""
        saved = f"the run is saved at image {self.nimg:,}, and the same command goes on from there"
        if not self._save(last=True):
            saved = "the same command goes on from the last checkpoint"
        self.report.close()
        if self.feed.error is not None and not isinstance(self.feed.error, errors.UserError):
            self.heart.own = self.feed.error
            return self.feed.error
        return TrainingError(f"{self.feed.reason()}; {saved}")

    def _go_back(self) -> None:
        """Return to the last good checkpoint, to go on from there with a lower learning rate."""
        failed = self.nimg
        self.heart.at("returning to the last good checkpoint")
        path = self.keeper.retreat()
        if path is None:
            raise self._failed()
        state = checkpoint.load(path, self.engine)
        self.nimg, self.seconds, self.due = state["nimg"], state["seconds"], False
        self.keeper.resume(path, self.nimg, state.get("health"), proven=True)
        self.returns += 1
        self.report.close()
        self._begin(self.report)
        self.report.say(
            f"bad steps up to image {failed:,}: returned to {path}, return {self.returns} of "
            f"{self.config.train.returns}; the learning rate is {self.config.train.return_lr**self.returns:g} times "
            "what optimizer says"
        )

    def _validate(self, interval: Interval) -> None:
        """Measure the validation loss where it is due: before this image's checkpoint, and at the end."""
        every, batch = self.config.data.validation.every_images, self.config.train.global_batch
        if self.validation is None or not (crossed(self.nimg, batch, every) or self.nimg >= self.parts.total):
            return
        self.heart.at("measuring the validation loss")
        with interval.paused("validation_seconds"):
            self.report.metrics.write({"nimg": self.nimg, **self.validation.measure(self.heart.moved)})

    def _grid_is_due(self) -> bool:
        """Whether a grid belongs to this image; the one of the last image is drawn at the end."""
        every = self.config.sample.grid_every_images
        return crossed(self.nimg, self.config.train.global_batch, every) and self.nimg < self.parts.total

    def _grid(self) -> bool:
        """Draw this image's grid. Where a signal ends it, save, and return False: the resumed run draws it."""
        self.heart.at("drawing a grid")
        drawn = self.report.grid(self.folder.samples(self.nimg), self.nimg, self._asked)
        if not drawn:
            self._save(last=True)
        return drawn

    def _asked(self) -> bool:
        """Whether this rank was asked to stop; being asked shows that it gets on."""
        self.heart.moved()
        return self.signals.requested

    def _draw_missing_grid(self) -> bool:
        """Draw the grid that a stop or a kill took after its image's checkpoint. Returns as `_grid`."""
        missing = self.nimg > 0 and self._grid_is_due() and not self.folder.samples(self.nimg).exists()
        # rank 0's look at the folder counts
        return not any_rank([missing and self.rank == 0], self.engine.host_group)[0] or self._grid()

    def _save(self, last: bool) -> bool:
        """Write a checkpoint; returns whether there is one now or soon. None is written while steps are bad."""
        self.heart.at("saving a checkpoint")
        state = {
            "config": cfg.to_dict(self.config),
            "classes": self.parts.classes,
            "data": self._data(),
            "seconds": self.seconds,
            "returns": self.returns,
            PUBLISHED: self.published,
        }
        taken = self.keeper.save(self.nimg, state, last)
        self.due = not taken
        return taken

    def _data(self) -> dict[str, Any]:
        """What a checkpoint keeps of the data, to be compared on resuming."""
        held = self.parts.held
        apart = {} if held is None else {"held_out": held.fingerprint}
        index = self.parts.index
        return {"images": len(index), "fingerprint": index.fingerprint, "order": RULE} | apart

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
            if suspects := checkpoint.suspects(self.folder.checkpoints):
                raise checkpoint.CheckpointError(
                    f"no checkpoint in {self.folder.checkpoints} is known to be good: {suspects[0]} was set aside "
                    "after bad steps; rename it to its number to go on from it, or choose another run.dir to begin anew"
                )
            return
        state = checkpoint.read_state(path, checkpoint.RUN)
        changed = differences(with_defaults(state["config"], self.read_config), cfg.to_dict(self.config))
        fixed = [key for key in changed if key.startswith(self.fixed_sections) or key in self.fixed]
        if averages(state["config"], path) != {*self.config.optimizer.ema}:
            fixed.append("optimizer.ema")
        if fixed or state["classes"] != self.parts.classes:
            what = ", ".join(f"{key} ({changed[key]})" for key in fixed) or f"classes of {self.config.data.root}"
            raise cfg.ConfigError(
                f"{path} was trained with other settings: {what}; choose another run.dir, or change them back"
            )
        checkpoint.load(path, self.engine)
        self.nimg, self.seconds = state["nimg"], state["seconds"]
        self.published = published_in(state)
        self.returns = state["returns"] if isinstance(state.get("returns"), int) else 0
        # the losses of another objective or other data have another range
        other = any(key.startswith(("objective.", "alignment.")) or key in PICTURED for key in changed)
        self.keeper.resume(path, self.nimg, None if other else state.get("health"))
        if self.rank == 0:
            self._say_resumed(path, changed, state.get("data"))

    def _say_resumed(self, path: Path, changed: dict[str, str], data: Any) -> None:
        """Say what came back, and what is not as it was. data: what the checkpoint keeps of them."""
        print(
            f"resumed {path}: image {self.nimg:,} of {self.parts.total:,}, weights, optimizer moments and averages "
            f"{', '.join(str(d) for d in self.config.optimizer.ema)} restored"
        )
        for key, change in changed.items():
            print(f"  {key} has changed: {change}")
        for text in data_changes(data, self._data()):
            print(f"  {text}; image numbers mean other images than before")
        for text in held_changes(data, self._data()):
            print(f"  {text}")

    def _check_folder(self) -> None:
        """Refuse to start a run that cannot write its folder, or whose checkpoints will not fit."""
        if self.rank:
            return
        # the good one may stand beside the newest
        root, keep = self.folder.root, max(self.config.save.keep, 2)
        for path in (root, self.folder.checkpoints, self.folder.tensorboard, self.folder.samples(0).parent):
            if path.exists() and not path.is_dir():
                raise TrainingError(
                    f"{path} is a file where the run keeps a folder; move it, or choose another run.dir"
                )
        root.mkdir(parents=True, exist_ok=True)
        numel = sum(torch.Size(shape).numel() for shape in self.engine.shapes.values())
        size = 4 * numel * (3 + len(self.config.optimizer.ema))
        more = keep + 1 - min(len(checkpoint.checkpoints(self.folder.checkpoints)), keep)  # those that are there stay
        need, free = size * more, shutil.disk_usage(root).free
        if free < need:
            raise TrainingError(
                f"{root}: {keep} checkpoints and one being written need {need / 1e9:.1f} GB more, "
                f"{free / 1e9:.1f} GB are free; free some, choose another run.dir or a smaller save.keep"
            )

    def _stopped(self) -> int:
        self.report.close()
        saved = "saved; the same command goes on from here"
        if self.keeper.saved != self.nimg:
            saved = "not saved, for its last steps were bad; the same command goes on from its last checkpoint"
        if self.rank == 0:
            print(f"stopped by a signal at image {self.nimg:,}, {saved}")
        return REQUEUE


def crossed(nimg: int, batch: int, interval: int) -> bool:
    """Whether the step of `batch` images that ended at nimg reached a multiple of the interval (0: never)."""
    return interval > 0 and nimg // interval > (nimg - batch) // interval
