"""What the runs of a comparison left: curves, judgements, speed and size of each variant over its seeds."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from pixelgen_fast.compare.schema import Compare, judgements, needs, run_folder
from pixelgen_fast.eval.curves import read_metrics, with_measured
from pixelgen_fast.models.system import BaseSystem, SequentialSystem, System
from pixelgen_fast.runs.folder import RunFolder

# how a variant comes to an image
PIXELS, LATENTS, PIECES = "pixels at once", "latents, decoded", "pixels, piece by piece"


@dataclass(frozen=True)
class Spread:
    """Values of one quantity, one a seed; none where a run has none."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def half_range(self) -> float:
        return (max(self.values) - min(self.values)) / 2

    def text(self, form: str) -> str:
        if not self.values:
            return ""
        return format(self.mean, form) + (f" ± {format(self.half_range, form)}" if len(self.values) > 1 else "")


@dataclass(frozen=True)
class Judged:
    """A variant after `nimg` images, over its seeds. seconds: of training until then."""

    nimg: int
    seconds: Spread
    accuracy: Spread
    frechet: Spread


@dataclass(frozen=True)
class Variant:
    """One variant over its seeds.

    kind: PIXELS, LATENTS or PIECES. needs: what the comparison trained for it beforehand, "teacher" or "decoder".
    rows: of metrics.jsonl, a list a seed. points: it was judged at, the last at its end. by_class: share of each class
    that was drawn right, the mean over seeds. flow: the last tenth of the flow-matching loss, averaged; empty for
    another loss. draw_ms: milliseconds that an image takes to draw.
    """

    name: str
    kind: str
    needs: tuple[str, ...]
    folders: tuple[Path, ...]
    rows: tuple[list[dict[str, Any]], ...]
    points: tuple[Judged, ...]
    by_class: dict[str, float]
    flow: Spread
    alignment: Spread
    images_per_second: Spread
    draw_ms: Spread
    parameters: int

    @property
    def accuracy(self) -> Spread:
        return self.points[-1].accuracy

    @property
    def frechet(self) -> Spread:
        return self.points[-1].frechet

    @property
    def seconds(self) -> Spread:
        return self.points[-1].seconds


def collect(compare: Compare) -> tuple[list[Variant], dict[str, Any]]:
    """Every variant, and the judgement of the real images (its report of one run)."""
    variants = [_variant(compare, name) for name in compare.variants]
    return variants, _read(RunFolder(variants[0].folders[0]).evaluation)["report"]


def _variant(compare: Compare, name: str) -> Variant:
    folders = tuple(run_folder(compare, name, seed) for seed in compare.seeds)
    rows = tuple(with_measured(read_metrics(RunFolder(folder).metrics)) for folder in folders)
    found = [_read(RunFolder(folder).evaluation) for folder in folders]
    model = load_model(folders[0])
    flows = [last_tenth(r, flow_key(r)) for r in rows if isinstance(model, System)]
    shares = [one["report"]["per_class"] for one in found]
    return Variant(
        name=name,
        kind=kind(model),
        needs=needs(compare, name),
        folders=folders,
        rows=rows,
        points=_points(folders, rows),
        by_class={label: statistics.fmean(share[label] for share in shares) for label in shares[0]},
        flow=Spread(tuple(flows)),
        alignment=Spread(tuple(last_tenth(r, "loss_alignment") for r in rows if "loss_alignment" in r[-1])),
        images_per_second=Spread(tuple(statistics.median(row["images_per_second"] for row in r) for r in rows)),
        draw_ms=Spread(tuple(1000 * one["drawing"]["seconds"] / one["report"]["generated"] for one in found)),
        parameters=sum(p.numel() for p in model.parameters()),
    )


def _points(folders: tuple[Path, ...], rows: tuple[list[dict[str, Any]], ...]) -> tuple[Judged, ...]:
    """The places at which every seed was judged."""
    reports = [{nimg: _read(path)["report"] for nimg, path in judgements(folder).items()} for folder in folders]
    common = sorted(set.intersection(*map(set, reports)))
    return tuple(
        Judged(
            nimg,
            Spread(tuple(seconds(r, nimg) for r in rows)),
            Spread(tuple(report[nimg]["share"] for report in reports)),
            Spread(tuple(report[nimg]["frechet_generated"] for report in reports)),
        )
        for nimg in common
    )


def seconds(rows: list[dict[str, Any]], nimg: int) -> float:
    """Seconds of training until an image, without saving and drawing."""
    steps = pairwise([0, *(row["nimg"] for row in rows)])
    return sum((b - a) / row["images_per_second"] for (a, b), row in zip(steps, rows, strict=True) if b <= nimg)


def kind(model: BaseSystem) -> str:
    if isinstance(model, SequentialSystem):
        return PIECES
    return PIXELS if type(model).encode is System.encode else LATENTS


def flow_key(rows: list[dict[str, Any]]) -> str:
    """The column of the flow-matching loss alone: a loss of one part has no columns for its parts."""
    return "loss_flow" if "loss_flow" in rows[-1] else "loss"


def last_tenth(rows: list[dict[str, Any]], key: str) -> float:
    values = [row[key] for row in rows if row.get(key) is not None]
    return statistics.fmean(values[-max(1, len(values) // 10) :])


def load_model(folder: Path) -> BaseSystem:
    """The generator of a run, from its newest checkpoint."""
    from pixelgen_fast.runs import draw

    return draw.load(folder).model


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())
