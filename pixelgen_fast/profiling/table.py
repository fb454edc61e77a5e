"""What a profile has found, as a table for a terminal and as JSON."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pixelgen_fast.profiling.ledger import Heavy, Ledger, work_of
from pixelgen_fast.profiling.regions import Shapes, Work

HEAVIEST = 10
_PLAIN = ("loader", "optimizer")  # neither forward nor backward


@dataclass(frozen=True)
class Found:
    """Of one profile. alone, profiled: seconds of a step without and under the profiler.

    work: of one step, by operator and shapes. saved, weights: bytes by part. product: FLOP/s of a matrix product here;
    copy: bytes a second of a copy.
    """

    device: str
    images: int
    steps: int
    alone: float
    profiled: float
    ledger: Ledger
    work: Mapping[tuple[str, Shapes], Work]
    saved: Mapping[str, int]
    weights: Mapping[str, int]
    product: float
    copy: float

    @property
    def covered(self) -> float:
        """The times of all parts, as a share of the step under the profiler on a CPU, of the busy time on a GPU."""
        whole = self.ledger.busy if self.device == "cuda" else self.profiled
        return sum(self.ledger.parts.values()) / whole if whole else 0.0

    @property
    def idle(self) -> float:
        """Share of a step in which nothing runs. On a GPU of the step without the profiler, which slows the host."""
        if self.device == "cuda":
            return max(0.0, 1 - self.ledger.busy / self.alone)
        return self.ledger.idle / self.ledger.whole if self.ledger.whole else 0.0


def as_dict(found: Found) -> dict[str, Any]:
    """Plain types, for JSON."""
    times: dict[str, dict[str, float]] = defaultdict(dict)
    for (part, stage), seconds in found.ledger.parts.items():
        times[part][stage or "between"] = seconds
    return {
        "device": found.device,
        "images": found.images,
        "steps": found.steps,
        "step_seconds": found.alone,
        "profiled_step_seconds": found.profiled,
        "covered_share": found.covered,
        "idle_share": found.idle,
        "loader_seconds": found.ledger.waiting,
        "parts": {
            part: {"seconds": of, "weight_bytes": found.weights.get(part, 0), "saved_bytes": found.saved.get(part, 0)}
            for part, of in times.items()
        },
        "heaviest": [_row(heavy, found) for heavy in found.ledger.heavy[:HEAVIEST]],
        "ceilings": {"matrix_product_flops_per_second": found.product, "copy_bytes_per_second": found.copy},
    }


def _row(heavy: Heavy, found: Found) -> dict[str, Any]:
    """An operator with its rates; none of what has no formula and moves nothing."""
    row = {
        "operator": heavy.name,
        "kernel": heavy.kernel,
        "shapes": [list(shape) for shape in heavy.shapes],
        "calls": heavy.calls,
        "seconds": heavy.seconds,
    }
    work = work_of(heavy, found.work)
    if work is None or not heavy.seconds:
        return row
    flops, nbytes = (heavy.calls * amount / heavy.seconds for amount in work)
    rates = {"flops_per_second": flops, "bytes_per_second": nbytes}
    return row | rates | {"of_product": flops / found.product, "of_copy": nbytes / found.copy}


def lines(found: Found) -> list[str]:
    """The tables for people."""
    what = "kernels" if found.device == "cuda" else "the thread"
    said = [
        f"{found.images} images a step on {found.device}: {1e3 * found.alone:,.1f} ms, under the profiler "
        f"{1e3 * found.profiled:,.1f} ms (mean of {found.steps}); times below are of {what}, under the profiler",
        "",
        f"{'part':<34}{'forward':>10}{'backward':>10}{'all':>10}{'share':>8}{'weights':>10}{'kept':>10}",
        f"{'':<34}{'ms':>10}{'ms':>10}{'ms':>10}{'':>8}{'MB':>10}{'MB':>10}",
    ]
    said += _parts(found)
    idle = f"nothing runs {found.idle:.1%} of a step"
    if found.device == "cpu":
        idle += f", {1e3 * found.ledger.waiting:,.1f} ms of it waiting for images, the rest Python and DeepSpeed"
    said += [
        f"the parts add up to {found.covered:.1%} of "
        + ("the time in which kernels run" if found.device == "cuda" else "the step"),
        idle,
        "",
        f"ceilings here: matrix product {found.product / 1e9:,.0f} GFLOP/s, copy {found.copy / 1e9:,.1f} GB/s",
        f"{'heaviest':<60}{'calls':>7}{'ms':>9}{'GFLOP/s':>10}{'':>7}{'GB/s':>9}",
    ]
    return said + [_heavy_line(_row(heavy, found)) for heavy in found.ledger.heavy[:HEAVIEST]]


def _parts(found: Found) -> list[str]:
    whole = sum(found.ledger.parts.values())
    by_part: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for (part, stage), seconds in found.ledger.parts.items():
        by_part[part][stage] += seconds
    rows = []
    for part, of in sorted(by_part.items(), key=lambda item: -sum(item[1].values())):
        own = sum(of.values())
        both = [f"{1e3 * of[stage]:>10,.2f}" if stage in of and part not in _PLAIN else f"{'':>10}" for stage in
                ("forward", "backward")]  # fmt: skip
        memory = "".join(f"{amount.get(part, 0) / 1e6:>10,.2f}" for amount in (found.weights, found.saved))
        rows.append(f"{part:<34}{''.join(both)}{1e3 * own:>10,.2f}{own / whole:>8.1%}{memory}")
    return rows


def _heavy_line(row: dict[str, Any]) -> str:
    shapes = " ".join("x".join(map(str, shape)) for shape in row["shapes"][:3])
    name = f"{row['kernel'] or row['operator']} {shapes}"
    name = name if len(name) < 59 else f"{name[:56]}..."
    line = f"{name:<60}{row['calls']:>7,.0f}{1e3 * row['seconds']:>9,.2f}"
    if "of_product" not in row:
        return line
    flops = f"{row['flops_per_second'] / 1e9:>10,.0f}{row['of_product']:>7.0%}" if row["of_product"] else f"{'':>17}"
    return line + flops + f"{row['bytes_per_second'] / 1e9:>9,.1f}{row['of_copy']:>5.0%}"
