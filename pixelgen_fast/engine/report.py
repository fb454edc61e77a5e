"""What a run says of itself: the start line, a row of metrics an interval, a grid of images, and the end."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pixelgen_fast import config as cfg
from pixelgen_fast import models
from pixelgen_fast.atomic import replaced
from pixelgen_fast.data.dali import Loader
from pixelgen_fast.engine.assemble import Parts
from pixelgen_fast.engine.collectives import any_rank
from pixelgen_fast.engine.metrics import Metrics, device_peak, memory_used
from pixelgen_fast.engine.schedule import learning_rate
from pixelgen_fast.eval.curves import read_metrics, save_curves
from pixelgen_fast.eval.grid import save_grid
from pixelgen_fast.pages.run import write_report
from pixelgen_fast.pages.settings import defaults_of
from pixelgen_fast.runs.checkpoint import ema_key
from pixelgen_fast.runs.draw import Generator, load_weights, strip_prefix
from pixelgen_fast.runs.folder import RunFolder

# the validation loss of the average of the weights, and of the weights themselves; see validation.py
VALIDATION = ("validation_loss", "validation_loss_raw")


class DrawingStopped(Exception):
    """A signal to any rank ended the drawing of a grid."""


class Report:
    """The reporting of one process; only rank 0 writes.

    nimg: image at which the run starts or goes on. returns: how often it has gone back to a checkpoint by itself.
    before: of this process, when it goes back; what the run is has been said then.
    """

    def __init__(self, parts: Parts, nimg: int, returns: int = 0, before: Report | None = None) -> None:
        self.parts, self.returns, self.begun_at = parts, returns, nimg
        if before is not None:
            self.peak = before.peak
        else:
            self.peak = self._describe() if parts.rank == 0 else float("nan")
        self.metrics = Metrics(parts.folder, parts.rank, nimg, parts.total, parts.config)
        self.losses = torch.zeros(2 + len(parts.objective.columns), device=parts.device)
        self.drawer: Generator | None = None
        self.unwritten: dict[Path, Callable[[], object]] = {}

    def say(self, text: str) -> None:
        self.metrics.say(text)

    def add(self, images: int, losses: Tensor) -> None:
        """A step has been made. losses: as `training_step` gives them."""
        self.losses += losses
        self.metrics.advance(images)

    def row(self, nimg: int, interval: Interval, loader: Loader) -> float:
        """Write a row of metrics; the only place of the loop that waits for the device. Returns its seconds."""
        p = self.parts
        if p.world > 1:
            dist.all_reduce(self.losses)
        (count, *sums), seconds = self.losses.tolist(), interval.elapsed()
        self.losses.zero_()
        loss, *others = [total / count if count else None for total in sums]
        batch, rate = p.config.train.global_batch, (nimg - interval.nimg) / seconds
        self.metrics.write(
            {
                "nimg": nimg,
                "step": nimg // batch,
                "loss": loss,
                **{self.column(name): mean for name, mean in zip(p.objective.columns, others, strict=True)},
                **self._of_alignment(interval.nimg, nimg, seconds, dict(zip(p.objective.columns, others, strict=True))),
                "grad_norm": float(p.engine.grad_norm),
                "lr": self.rate(nimg - batch) * p.config.train.return_lr**self.returns,
                "images_per_second": rate,
                "model_flops": rate * p.image_flops,
                "model_flops_share": rate * p.image_flops / (self.peak * p.world) if p.rank == 0 else 0.0,
                "memory_bytes": memory_used(p.device),
                "loader_wait_share": interval.waited(loader) / seconds,
                "skipped_steps": int(p.engine.skipped),
                "replaced_images": len(loader.replaced),
                **({"returns": self.returns} if p.config.train.returns else {}),
            },
            interval.pauses | {"begun_at": self.begun_at},
        )
        self._try_again()
        return seconds

    def _of_alignment(self, first: int, last: int, seconds: float, means: dict[str, float | None]) -> dict[str, Any]:
        """The columns of feature alignment for the images [first, last), where there is one.

        means: over all of these images, of which the loss acts on a share: loss_alignment is that of the share, None
        where there is none. Says once that the loss has ended.
        """
        alignment = self.parts.objective.alignment
        if alignment is None:
            return {}
        columns: dict[str, Any] = {"teacher_share": alignment.stopwatch.take() / seconds}
        if alignment.stop is None:
            return columns
        share, mean = alignment.share(first, last), means["alignment"]
        if share < 1 and first < alignment.stop:
            self.say(f"the alignment loss has ended at image {alignment.stop:,} (alignment.stop_images)")
        loss = mean / share if share and mean is not None else None
        return columns | {"loss_alignment": loss, "aligned_share": share}

    def column(self, part: str) -> str:
        """What a row of metrics calls a part of the loss."""
        return f"loss_{part}"

    def rate(self, nimg: int) -> float:
        """The scheduled learning rate of the step that begins at an image."""
        return learning_rate(self.parts.config.optimizer, nimg, self.parts.total)

    def grid(self, path: Path, nimg: int, requested: Callable[[], bool]) -> bool:
        """A labelled grid on fixed noise from the first average of the weights, drawn by rank 0. All ranks call it.

        requested: whether this rank was asked to stop; any rank's wish ends the drawing at the next pass through the
        network. Returns whether the grid was drawn, the same on every rank.
        """
        p = self.parts
        weights = ema_key(p.config.optimizer.ema[0])
        state = p.engine.state_dict(weights, to=0)

        def agree(done: bool) -> bool:
            stop, done = any_rank([requested(), done], p.engine.host_group)
            if stop and not done:
                raise DrawingStopped
            return done

        try:
            if p.rank == 0:
                images, labels = self._draw(state, weights, nimg, lambda: agree(False))
                agree(True)
                self._keep(path, lambda: self._save_grid(images, labels, path))
            while p.rank and not agree(False):
                pass
        except DrawingStopped:
            return False
        return True

    def _draw(
        self, state: dict[str, Tensor], weights: str, nimg: int, before_pass: Callable[[], object]
    ) -> tuple[Tensor, Tensor]:
        """Images uint8 [N, S, S, 3] and their labels [N], some of each of the first classes."""
        p, s = self.parts, self.parts.config.sample
        if self.drawer is None:
            model = models.build_model(p.built, len(p.classes)).eval()
            self.drawer = Generator(model, p.config, p.classes, weights, nimg)
        model = self.drawer.model
        load_weights(model.cpu(), strip_prefix(state), "the average of this run")
        model.to(p.device)
        labels = torch.arange(min(s.grid_classes, len(p.classes))).repeat_interleave(s.grid_per_class)
        try:
            return self.drawer.draw(labels, before_pass=before_pass), labels
        finally:
            # between grids their memory is the run's
            for idle in (model, *(guide.model for guide in self.drawer.guides.values())):
                idle.cpu()

    def _save_grid(self, images: Tensor, labels: Tensor, path: Path) -> None:
        columns = self.parts.config.sample.grid_per_class
        names = [self.parts.classes[int(y)] for y in labels[::columns]]
        save_grid(images.numpy(), path, columns=columns, row_titles=names)

    def finish(self, nimg: int, seconds: float, requested: Callable[[], bool]) -> bool:
        """The last grid, curve and page, and where everything is. Returns False where a signal ended the drawing."""
        folder = self.parts.folder
        if not self.grid(folder.final, nimg, requested):
            return False
        self.metrics.close()
        if self.parts.rank:
            return True
        self._keep(folder.loss, lambda: _save_losses(folder))
        self._keep(folder.report, lambda: write_report(folder, defaults_of(self.parts.config)))
        self._try_again()
        print(
            f"done: {nimg:,} images in {seconds:.0f} s; samples {folder.final}, loss {folder.loss}, page "
            f"{folder.report}, weights {folder.checkpoints}. Next: pixelgen evaluate {folder.root}"
        )
        return True

    def _keep(self, path: Path, write: Callable[[], object]) -> None:
        """Write a picture. One that cannot be written is said to be missing, costs nothing else, and is tried again."""
        try:
            write()
        except Exception as error:  # libraries that draw, or lack a part of theirs, have errors of many kinds
            if path not in self.unwritten:
                self.say(f"{path} is missing, the run goes on: {error}")
            self.unwritten[path] = write
        else:
            self.unwritten.pop(path, None)

    def _try_again(self) -> None:
        for path, write in list(self.unwritten.items()):
            self._keep(path, write)

    def close(self) -> None:
        self.metrics.close()

    def _describe(self) -> float:
        """Write what the run is, and print it; returns the device's peak FLOP/s."""
        p = self.parts
        for path, text in ((p.folder.config, cfg.to_yaml(p.config)), (p.folder.classes, json.dumps(p.classes) + "\n")):
            with replaced(path) as work:
                work.write_text(text)
        peak, what = device_peak(p.device)
        print(f"{self.headline()}\npeak: {peak / 1e9:,.0f} GFLOP/s ({what})\n{p.operators}")
        return peak

    def headline(self) -> str:
        """What the run is, in a line."""
        p, t = self.parts, self.parts.config.train
        return (
            f"{p.folder.root}: {len(p.index):,} images in {len(p.classes)} classes; "
            f"{sum(torch.Size(s).numel() for s in p.engine.shapes.values()):,} parameters; "
            f"{p.world} x {p.device.type}, {p.precision}{self.sharding()}; "
            f"{t.global_batch} images a step = {p.world} ranks x {p.order(0).accumulation} x {t.micro_batch}"
        )

    def sharding(self) -> str:
        """How the run's state lies on its ranks, for the headline."""
        return f", ZeRO stage {self.parts.config.train.zero_stage}"


def _save_losses(folder: RunFolder) -> None:
    """The loss of training over images, and that of validation below it."""
    rows = read_metrics(folder.metrics)
    lines = [key for key in VALIDATION if any(row.get(key) is not None for row in rows)]
    save_curves(rows, folder.loss, lines=lines, title=folder.root.name)


class Interval:
    """Where the present interval of the log began; saving and drawing do not count as training time.

    pauses: the seconds of each since then.
    """

    def __init__(self, nimg: int, loader: Loader) -> None:
        self.nimg, self.start, self.wait = nimg, time.perf_counter(), loader.wait_seconds
        self.pauses = {"saving_seconds": 0.0, "drawing_seconds": 0.0}

    def elapsed(self) -> float:
        return time.perf_counter() - self.start

    @contextmanager
    def paused(self, what: str) -> Iterator[None]:
        """what: the name of the pause."""
        begin = time.perf_counter()
        yield
        spent = time.perf_counter() - begin
        self.start += spent
        self.pauses[what] = self.pauses.get(what, 0.0) + spent

    def waited(self, loader: Loader) -> float:
        return loader.wait_seconds - self.wait
