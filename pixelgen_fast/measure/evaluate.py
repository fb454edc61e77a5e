"""`pixelgen evaluate`: draw one set of images with the settings that were asked for, and judge it.

Labels are in equal numbers of every class, in turn, unless they are asked for at random, as some published numbers have
them (about 0.1 FID more). Whole batches go round the ranks, so that each image is drawn in the company in which one
process would draw it; what is kept of a batch is a file at once (parts.py), and the same command goes on from those.
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from pixelgen_fast import errors
from pixelgen_fast.atomic import replaced
from pixelgen_fast.engine.team import Team
from pixelgen_fast.eval.sources import LEAST
from pixelgen_fast.measure.judges import ROUNDING, DigitsJudge, FeatureJudge, Judge, Report, need_reference
from pixelgen_fast.measure.parts import Parts
from pixelgen_fast.runs import draw
from pixelgen_fast.runs.draw import Generator
from pixelgen_fast.runs.folder import RunFolder

BALANCED, AT_RANDOM = "balanced", "random"


@dataclass(frozen=True)
class Request:
    """What a command asks for. changes: of the run's settings of drawing. samples: None for the judge's own count."""

    run: str
    weights: str | None
    device: str
    changes: dict[str, Any] = field(default_factory=dict)
    samples: int | None = None
    labels: str = BALANCED
    reference: str | None = None
    inception: str | None = None
    dino: str | None = None
    out: Path | None = None

    @property
    def folder(self) -> Path:
        """Where results go: that of --out, or the run."""
        return Path(self.run) if self.out is None else self.out.parent


@dataclass(frozen=True)
class Measured:
    """What one set of images showed. settings: by which they were drawn. images: what they are."""

    settings: dict[str, Any]
    images: dict[str, Any]
    drawing: dict[str, Any]
    report: Report

    def as_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        return vars(self) | {"report": self.report.as_dict()}

    def lines(self, run: str) -> list[str]:
        """For people, one line each."""
        settings = ", ".join(f"{name} {value}" for name, value in self.settings.items())
        return [f"{run}: {settings}", *self.report.lines(), f"drawn: {self.images['labels']}; {ROUNDING}"]


def evaluate(request: Request, team: Team) -> None:
    """Judge one set of images; rank 0 prints and writes the report."""
    loaded = draw.load(request.run, request.weights, request.device)
    found = measure(loaded, request, choose_judge(loaded, request, team), team)
    if found is not None:
        print("\n".join(found.lines(request.run)))
        write_json(request.out or RunFolder(Path(request.run)).evaluation, found.as_dict())


def write_json(path: Path, found: Any) -> None:
    with replaced(path) as work:
        work.write_text(json.dumps(found, indent=2) + "\n")


def choose_judge(loaded: Generator, request: Request, team: Team) -> Judge:
    """Who judges the images of a model. Raises what can be said before any is drawn, on every rank."""
    data = loaded.config.data
    if data.root == "digits" and request.reference is None:
        return DigitsJudge()
    reference = need_reference(request.reference)
    if request.samples is not None and request.samples < LEAST:
        raise errors.InputError(f"--samples is {request.samples}; the Inception Score needs at least {LEAST} images")

    def build() -> FeatureJudge:
        return FeatureJudge(
            reference, data.image_size, inception=request.inception, dino=request.dino, device=request.device
        )

    first: list[FeatureJudge] = []

    def check() -> None:
        first.append(build())
        first[0].check()

    team.first(check)  # before the others: weights that are downloaded are there for them
    return first[0] if first else build()


def measure(loaded: Generator, request: Request, judge: Judge, team: Team) -> Measured | None:
    """Draw and judge; the result on rank 0, None on the others. All ranks call it."""
    count = request.samples or judge.count
    labels = choose_labels(count, len(loaded.classes), request.labels)
    settings = settings_of(loaded, request.changes)
    batch = settings.pop("batch")  # the images do not depend on it
    known = identity(loaded, settings, request, judge, count) | {"batch": batch}
    parts = Parts(request.folder, known)
    there = team.first(parts.there)
    _draw(loaded, labels.split(batch), request.changes, judge, parts, there, team)
    if not team.gather(True):  # every rank has drawn its share
        return None
    kept, seconds = parts.collect(-(-count // batch))
    report = judge.report(kept, labels)
    parts.remove()
    about = {"count": count, "labels": labels_in_words(count, len(loaded.classes), request.labels)}
    device = str(next(loaded.model.parameters()).device)
    drawing = {"seconds": seconds / team.world, "processes": team.world, "device": device}
    return Measured(settings, about | {"rounding": ROUNDING}, drawing, report)


def settings_of(loaded: Generator, changes: dict[str, Any]) -> dict[str, Any]:
    """By which settings a model draws, with what it is."""
    used = [*loaded.model.used_sampling]
    settings = {name: getattr(loaded.config.sample, name) for name in vars(loaded.config.sample) if name in used}
    return settings | changes | {"weights": loaded.weights, "nimg": loaded.nimg}


def identity(loaded: Generator, settings: dict[str, Any], request: Request, judge: Judge, count: int) -> dict[str, Any]:
    """All that a result depends on but for the reference, as JSON has it."""
    said = {"model_sha256": _digest(loaded.model), "count": count, "labels": request.labels}
    if settings.get("guide") is not None:
        said["guide_sha256"] = _digest(loaded.guide(settings["guide"]).model)
    return json.loads(json.dumps({**settings, **said, **judge.identity}))


def _digest(model: nn.Module) -> str:
    """A checksum of a model's weights."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def choose_labels(count: int, classes: int, how: str) -> Tensor:
    """The class of each image, int64 [count]."""
    if how == AT_RANDOM:
        return torch.randint(classes, (count,), generator=torch.Generator().manual_seed(0))
    return torch.arange(count) % classes


def labels_in_words(count: int, classes: int, how: str) -> str:
    if how == AT_RANDOM:
        return f"{count:,} images, classes at random"
    each, more = divmod(count, classes)
    return f"{count:,} images, {each:,} of each class" + (f" and one more of {more}" if more else "")


def _draw(
    loaded: Generator,
    batches: tuple[Tensor, ...],
    changes: dict[str, Any],
    judge: Judge,
    parts: Parts,
    there: list[int],
    team: Team,
) -> None:
    """Draw this rank's share of the batches that are not there yet, and keep what the judge wants of each."""
    missing = sorted({*range(len(batches))} - {*there})
    share, size = missing[team.rank :: team.world], len(batches[0])
    if there and missing and team.rank == 0:
        print(f"{len(there)} of {len(batches)} batches are there from an earlier command")
    with tqdm(total=sum(len(batches[b]) for b in share), desc="draw", unit="img", disable=team.rank > 0) as bar:
        for b in share:
            begin = time.perf_counter()
            images = loaded.draw(batches[b], first=b * size, before_pass=team.heart.moved, **changes)
            seconds = time.perf_counter() - begin
            parts.write(b, judge.keep(images), seconds)
            errors.begin()
            bar.update(len(images))
