"""What the curves of a run show: from the rows of its metrics to panels of named columns, events, and where time went.

A row covers the images since the row before. Of an interval of n images at r images a second, the steps take n / r
seconds, of which `loader_wait_share` is waiting for images and `teacher_share` the frozen teacher of an alignment;
writing checkpoints and drawing grids come on top, in seconds of their own.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

MOST_POINTS = 4000
Row = Mapping[str, Any]

# what is not a curve of its own: the clock, and what other panels show
_NO_CURVE = ("nimg", "step", "begun_at")
_WASTE = {
    "loader": "waiting for images",
    "teacher": "teacher",
    "validation": "validation",
    "saving": "checkpoints",
    "drawing": "grids",
}
_VALIDATION = "validation_loss"
_NAMED = {
    "loss": "Loss",
    "grad_norm": "Gradient norm",
    "lr": "Learning rate",
    "images_per_second": "Images a second, in steps",
    "model_flops_share": "Share of the device's peak",
    "memory_bytes": "Peak memory",
}
_COUNTS = {"skipped_steps": "skipped steps", "replaced_images": "replaced images", "returns": "returns"}
_UNITS = {"model_flops_share": "share", "memory_bytes": "bytes"}
_LOGARITHMIC = ("loss", "grad_norm")  # where the switch to a logarithmic axis helps most


@dataclass(frozen=True)
class Panel:
    """One set of axes: series are (column, label); unit: "share", "bytes" or "" for plain numbers."""

    title: str
    series: list[tuple[str, str]]
    unit: str = ""


@dataclass(frozen=True)
class Curves:
    """columns: numbers by name, all as long as `nimg` among them. each: how many rows a point is the mean of."""

    columns: dict[str, list[float | None]]
    panels: list[Panel]
    events: list[tuple[int, str]]
    each: int


def curves(rows: Sequence[Row]) -> Curves:
    """What there is to be drawn of a run's rows, as `read_metrics` gives them."""
    spent = [seconds_of(before, row) for before, row in itertools.pairwise([_origin(rows), *rows])]
    wide = [{**_numbers(row), **_shares(seconds)} for row, seconds in zip(rows, _complete(spent), strict=True)]
    each = max(1, math.ceil(len(wide) / MOST_POINTS))
    names = dict.fromkeys(name for row in wide for name in row)
    columns = {name: [_mean(part, name) for part in _groups(wide, each)] for name in names}
    for name in (name for name in columns if name.startswith(_VALIDATION)):
        columns[name] = _through(columns["nimg"], columns[name])
    return Curves(columns, _panels(columns), events(rows), each)


def _through(nimg: Sequence[float], values: Sequence[float | None]) -> list[float | None]:
    """A line through what is measured now and then: between two measurements the points on it, outside of them none."""
    known = [(n, v) for n, v in zip(nimg, values, strict=True) if v is not None]
    if not known:
        return list(values)
    measured, found = zip(*known, strict=True)
    return [float(np.interp(n, measured, found)) if measured[0] <= n <= measured[-1] else None for n in nimg]


def seconds_of(before: Row, row: Row) -> dict[str, float]:
    """Seconds of the interval that ends with a row, by what they went to; nothing where its rate is not known."""
    images, rate = row["nimg"] - before["nimg"], row.get("images_per_second")
    if not rate or images <= 0:
        return {}
    steps = images / rate
    found = {"loader": steps * (row.get("loader_wait_share") or 0.0)}
    if row.get("teacher_share"):
        found["teacher"] = steps * row["teacher_share"]
    found["steps"] = steps - sum(found.values())
    if row.get("validation_seconds"):
        found["validation"] = row["validation_seconds"]
    return found | {name: row.get(f"{name}_seconds") or 0.0 for name in ("saving", "drawing")}


def _complete(spent: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
    """With no time for what other intervals have: a single point between gaps is no line."""
    names = dict.fromkeys(name for seconds in spent for name in seconds)
    return [{name: seconds.get(name, 0.0) for name in names} if seconds else {} for seconds in spent]


def where_time_went(rows: Sequence[Row]) -> dict[str, float]:
    """Seconds of all intervals, by what they went to, most first."""
    total: dict[str, float] = {}
    for before, row in itertools.pairwise([_origin(rows), *rows]):
        for name, seconds in seconds_of(before, row).items():
            total[name] = total.get(name, 0.0) + seconds
    named = {_WASTE.get(name, "training steps"): seconds for name, seconds in total.items()}
    return dict(sorted(named.items(), key=lambda item: -item[1]))


def events(rows: Sequence[Row]) -> list[tuple[int, str]]:
    """(image, what happened there): the run went on after a stop, or went back; steps were skipped."""
    found: list[tuple[int, str]] = []
    known: dict[str, int] = {}
    for row in rows:
        now = {name: row[name] for name in ("begun_at", "returns", "skipped_steps") if row.get(name) is not None}
        grown = {name: value - known.get(name, value) for name, value in now.items()}
        if grown.get("begun_at"):
            back = grown.get("returns", 0) > 0
            found.append((now["begun_at"], "went back to this image after bad steps" if back else "resumed"))
        elif (more := grown.get("skipped_steps", 0)) > 0:
            found.append((row["nimg"], f"{more} step{'s' * (more > 1)} skipped"))
        known = {"begun_at": 0} | known | now  # earlier versions did not say where a row's process began
    return found


def _origin(rows: Sequence[Row]) -> Row:
    """The row before the first: where the run, or what is left of its rows, began."""
    return {"nimg": min(rows[0].get("begun_at", 0), rows[0]["nimg"])}


def _numbers(row: Row) -> dict[str, float | None]:
    return {k: v for k, v in row.items() if k not in _NO_CURVE[1:] and (v is None or isinstance(v, int | float))}


def _shares(seconds: Mapping[str, float]) -> dict[str, float | None]:
    whole = sum(seconds.values())
    return {f"time_{name}": seconds[name] / whole for name in _WASTE if name in seconds and whole}


def _groups(rows: Sequence[Row], each: int) -> list[Sequence[Row]]:
    return [rows[k : k + each] for k in range(0, len(rows), each)]


def _mean(rows: Sequence[Row], name: str) -> float | None:
    """Of the finite numbers among the rows, to six digits; of the clock the last."""
    values = [row[name] for row in rows if row.get(name) is not None and math.isfinite(row[name])]
    if not values:
        return None
    return values[-1] if name == "nimg" else float(f"{sum(values) / len(values):.6g}")


def _panels(columns: Mapping[str, list[float | None]]) -> list[Panel]:
    """One for each quantity: what is known by name first, then whatever else a run logs."""

    def any_of(name: str) -> bool:
        return any(columns.get(name, ()))

    own = [name for name in columns if name not in (*_NO_CURVE, *_NAMED, *_COUNTS) and any_of(name)]
    shares = [(name, _WASTE[name.removeprefix("time_")]) for name in own if name.startswith("time_")]
    counts = [(name, label) for name, label in _COUNTS.items() if any_of(name)]
    validation = [name for name in own if name.startswith(_VALIDATION)]
    told = ("saving_seconds", "drawing_seconds", "validation_seconds", "loader_wait_share", "teacher_share")
    told = (*told, "model_flops", *validation)  # by other panels
    others = [name for name in own if not name.startswith("time_") and name not in told]
    losses = [name for name in others if name.startswith("loss")]
    order = ["loss", *losses, *(n for n in list(_NAMED)[1:] if n in columns), *(n for n in others if n not in losses)]
    panels = [
        Panel(_NAMED.get(name, _spoken(name)), [(name, _spoken(name))], _UNITS.get(name, ""))
        for name in order
        if any_of(name)
    ]
    by_time = [name for name in validation if name.startswith(f"{_VALIDATION}_t")]
    whole = [name for name in validation if name not in by_time]
    # every second of eight times: more lines than there are colours tell nothing
    for title, names in (("Validation loss by time", by_time[::2]), ("Validation loss", whole)):
        if names:
            panels.insert(1, Panel(title, [(name, _spoken(name)) for name in names]))
    if shares:
        panels.append(Panel("Time that was not training", shares, "share"))
    if counts:
        panels.append(Panel("Bad steps and images, so far", counts))
    return panels


def _spoken(name: str) -> str:
    return name.replace("_", " ").capitalize()
