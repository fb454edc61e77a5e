"""What the runs of a comparison left: curves, judgements, speed and size of each variant over its seeds."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pixelgen_fast.compare.schema import Compare, run_folder
from pixelgen_fast.eval.curves import read_metrics
from pixelgen_fast.runs.folder import RunFolder


@dataclass(frozen=True)
class Spread:
    """Values of one quantity, one a seed; None where a run has none."""

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
class Variant:
    """One variant over its seeds. rows: of metrics.jsonl, a list a seed. final: the last tenth of a curve, averaged."""

    name: str
    folders: tuple[Path, ...]
    rows: tuple[list[dict[str, Any]], ...]
    accuracy: Spread
    frechet: Spread
    flow: Spread
    alignment: Spread
    images_per_second: Spread
    parameters: int


def collect(compare: Compare) -> tuple[list[Variant], dict[str, Any]]:
    """Every variant, and the judgement of the real images (its report of one run)."""
    variants, real = [], {}
    for name in compare.variants:
        folders = tuple(run_folder(compare, name, seed) for seed in compare.seeds)
        rows = tuple(read_metrics(RunFolder(folder).metrics) for folder in folders)
        reports = [json.loads(RunFolder(folder).evaluation.read_text())["report"] for folder in folders]
        real = reports[0]
        variants.append(
            Variant(
                name=name,
                folders=folders,
                rows=rows,
                accuracy=Spread(tuple(report["share"] for report in reports)),
                frechet=Spread(tuple(report["frechet_generated"] for report in reports)),
                flow=Spread(tuple(last_tenth(r, flow_key(r)) for r in rows)),
                alignment=Spread(tuple(last_tenth(r, "loss_alignment") for r in rows if "loss_alignment" in r[-1])),
                images_per_second=Spread(tuple(statistics.median(row["images_per_second"] for row in r) for r in rows)),
                parameters=parameters(folders[0]),
            )
        )
    return variants, real


def flow_key(rows: list[dict[str, Any]]) -> str:
    """The column of the flow-matching loss alone: a loss of one part has no columns for its parts."""
    return "loss_flow" if "loss_flow" in rows[-1] else "loss"


def last_tenth(rows: list[dict[str, Any]], key: str) -> float:
    values = [row[key] for row in rows if row.get(key) is not None]
    return statistics.fmean(values[-max(1, len(values) // 10) :])


def parameters(folder: Path) -> int:
    """Weights that the run trained and drew with, from its newest checkpoint's description."""
    from pixelgen_fast.runs import draw

    return sum(p.numel() for p in draw.load(folder).model.parameters())
