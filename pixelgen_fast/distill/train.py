"""Training a teacher: minutes on two cores for the digits, so a run that is stopped starts anew when it is run again.

A step takes images nimg .. nimg + batch of the run's order over the part of the data that is not held out. The teacher
is judged on the held-out images: by nearest neighbours among the training images, whose labels are used for that alone,
and by the effective rank of its class tokens. The same seed gives the same teacher on the same machine and number of
threads.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from omegaconf import OmegaConf

from pixelgen_fast import config as cfg
from pixelgen_fast import errors
from pixelgen_fast.data.cache import published_folder
from pixelgen_fast.data.order import positions
from pixelgen_fast.device import choose_device
from pixelgen_fast.dino.network import save_teacher
from pixelgen_fast.distill.distillation import LOSSES, Distillation
from pixelgen_fast.distill.judge import Judge, load_images, split
from pixelgen_fast.distill.learner import ARCHITECTURE, Learner, network_kwargs
from pixelgen_fast.distill.schema import REPORT, TeacherConfig
from pixelgen_fast.engine.memory import keep_freed_memory
from pixelgen_fast.engine.metrics import Metrics
from pixelgen_fast.errors import InputError, UserError
from pixelgen_fast.eval.curves import read_metrics, save_curves
from pixelgen_fast.runs.folder import METRICS, RunFolder
from pixelgen_fast.signals import StopRequest

# What a stopped run leaves behind and the next one replaces.
_OWN_FILES = {"teacher.yaml", METRICS, "curves.png", REPORT}


@dataclass(frozen=True)
class TeacherReport:
    """What the held-out images showed. Accuracies are shares in [0, 1] of nearest-neighbour classification."""

    folder: str
    trained_on: int
    held_out: int
    neighbours: int
    knn_class: float
    knn_patches: float
    knn_pixels: float
    effective_rank: float
    deviation: float
    width: int
    seconds: float

    def lines(self) -> list[str]:
        """The report in words, one line each."""
        return [
            f"{self.folder}: trained on {self.trained_on} images in {self.seconds:.0f} s",
            f"    to use it: alignment.teacher={ARCHITECTURE} alignment.weights={self.folder}",
            f"{self.neighbours} nearest neighbours find the class of {self.held_out} images it never saw:",
            f"    {self.knn_class:.1%} by class tokens, {self.knn_patches:.1%} by mean patch tokens, "
            f"{self.knn_pixels:.1%} by pixels",
            f"class tokens have effective rank {self.effective_rank:.1f} of {self.width} and deviate by "
            f"{self.deviation:.4f} a dimension on the unit sphere ({self.width**-0.5:.4f} when spread evenly, 0 when "
            "collapsed)",
        ]


def train(config: TeacherConfig) -> TeacherReport:
    """Train to the end, judge the teacher in <run.dir>/report.json, and write <run.dir>/teacher for `load_dino`.

    Raises ConfigError for settings that do not fit the data, ValueError for a folder that is in use, RuntimeError when
    a signal stopped it or a loss is not finite.
    """
    folder = Path(config.run.dir)
    _claim(folder)
    device = choose_device(config.run.device)
    if device.type == "cpu":
        keep_freed_memory()
    start = time.perf_counter()
    images, labels = load_images(config)
    kept, held = split(labels, config.data.held_out)
    if config.log.neighbours > len(kept):
        raise cfg.ConfigError(f"log.neighbours is {config.log.neighbours} and the run trains on {len(kept)} images")
    judge = Judge(images, labels, kept, held, config.log.neighbours, device)
    errors.begin()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "teacher.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(asdict(config))))
    with StopRequest() as stop:
        teacher = _train(config, judge, folder, device, stop)
    save_curves(
        read_metrics(RunFolder(folder).metrics),
        folder / "curves.png",
        keys=("loss", "knn_class", "knn_patches"),
        title=f"{folder.name}: self-distillation, {config.log.neighbours} nearest neighbours",
    )
    report = TeacherReport(
        folder=str(folder / "teacher"),
        trained_on=len(kept),
        held_out=len(held),
        neighbours=config.log.neighbours,
        knn_pixels=judge.pixels(),
        width=config.network.embed_dim,
        seconds=time.perf_counter() - start,
        **judge(teacher),
    )
    _publish(config, teacher, judge, report, folder)
    return report


def _publish(config: TeacherConfig, teacher: Learner, judge: Judge, report: TeacherReport, folder: Path) -> None:
    (folder / REPORT).write_text(json.dumps(asdict(report), indent=2) + "\n")
    mean, std = judge.mean.flatten().tolist(), judge.std.flatten().tolist()
    with published_folder(folder / "teacher") as work:
        kwargs = network_kwargs(config)
        save_teacher(work, teacher.network, architecture=ARCHITECTURE, kwargs=kwargs, mean=mean, std=std)


def _train(config: TeacherConfig, judge: Judge, folder: Path, device: torch.device, stop: StopRequest) -> Learner:
    """The loop. Returns the teacher."""
    total, batch, log = config.train.images, config.train.batch, config.log
    distillation = Distillation(config, judge.mean, judge.std, device)
    metrics = Metrics(RunFolder(folder), rank=0, nimg=0, total=total)
    sums, steps, began, logged, judged = torch.zeros(len(LOSSES), device=device), 0, time.perf_counter(), 0, 0
    try:
        for nimg in range(0, total, batch):
            numbers = positions(config.run.seed, range(nimg, nimg + batch), len(judge.kept))
            sums, steps, seen = sums + distillation.step(judge.kept[numbers], nimg), steps + 1, nimg + batch
            metrics.advance(batch)
            if stop.requested:
                raise UserError(f"stopped by {stop.name} after {seen} of {total} images; run it again to start anew")
            if seen - logged < log.every_images and seen < total:
                continue
            losses = dict(zip(LOSSES, (sums / steps).tolist(), strict=True))
            if not math.isfinite(losses["loss"]):
                raise UserError(f"the loss is {losses['loss']} after {seen} images; lower optimizer.lr")
            row = {"nimg": seen, **losses, "images_per_second": (seen - logged) / (time.perf_counter() - began)}
            if seen - judged >= log.judge_every_images or seen >= total:
                row |= judge(distillation.teacher)
                judged = seen
            metrics.write(row)
            sums, steps, began, logged = torch.zeros_like(sums), 0, time.perf_counter(), seen
    finally:
        metrics.close()
    return distillation.teacher


def _claim(folder: Path) -> None:
    """Refuse a folder that holds a teacher or anything that a stopped run of this kind did not leave."""
    if (folder / "teacher").exists():
        raise InputError(f"run.dir {folder}: holds a trained teacher already; delete it, or choose another run.dir")
    others = sorted({p.name for p in folder.iterdir()} - _OWN_FILES) if folder.is_dir() else []
    if others:
        raise InputError(f"run.dir {folder}: holds {', '.join(others[:5])}, not of a teacher; choose another run.dir")
