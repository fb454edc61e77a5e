"""Training curves from a run's metrics.jsonl: the raw values faint, a running mean over them, images seen below.

Each line of the file is a JSON object with "nimg" (images seen) and named numbers, "loss" among them.
"""

from __future__ import annotations

import json
import math
import os
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pixelgen_fast.atomic import replaced


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl, as one run without interruptions would have written them.

    A resumed run starts again at its checkpoint, so a row replaces the earlier rows of higher nimg, and one of its own
    nimg with the same names. A process that is killed while writing leaves half a line: such lines are left out with a
    warning that names them. Raises ValueError if no line is a JSON object with nimg, a whole number.
    """
    rows: list[dict[str, Any]] = []
    unreadable = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        if not isinstance(row, dict) or type(row.get("nimg")) is not int:
            unreadable.append(number)
            continue
        if rows and row["nimg"] <= rows[-1]["nimg"]:
            rows = [r for r in rows if (r["nimg"], r.keys() == row.keys()) < (row["nimg"], True)]
        rows.append(row)
    if not rows:
        raise ValueError(f"{path} holds no metrics: none of its {len(unreadable)} lines is a JSON object with 'nimg'")
    if unreadable:
        warnings.warn(f"{path}: left out {len(unreadable)} unreadable lines, numbers {unreadable[:10]}", stacklevel=2)
    return rows


def with_measured(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of training, each with what was measured beside them up to its image, and after its own step.

    rows: as read_metrics gives them. Those of training have a loss; where none has, they are given as they are.
    """
    rows = [dict(row) for row in rows]
    joined: list[dict[str, Any]] = []
    waiting: dict[str, Any] = {}
    for row in rows:
        if "loss" in row:
            joined.append(waiting | row)
            waiting = {}
        elif joined and joined[-1]["nimg"] == row["nimg"]:
            joined[-1] = row | joined[-1]
        else:
            waiting |= row
    return joined or rows


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Centred mean of [n] values over an odd window; at the ends, over the part of the window that exists."""
    half = window // 2
    sums = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    index = np.arange(len(values))
    first, last = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    return (sums[last] - sums[first]) / (last - first)


def png_figures() -> tuple[type, type]:
    """matplotlib's canvas of PNG files and its Figure. Raises ImportError if it is missing.

    MPLBACKEND may name a notebook's backend that this environment does not have, and importing matplotlib would fail.
    """
    if "matplotlib" not in sys.modules:
        os.environ["MPLBACKEND"] = "agg"
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("curves are drawn with matplotlib: pip install matplotlib") from error
    return FigureCanvasAgg, Figure


def _points(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Images seen, and the numbers under a key where it is finite. Raises ValueError where it is nowhere."""
    points = [(row["nimg"], row[key]) for row in rows if row.get(key) is not None and math.isfinite(row[key])]
    if not points:
        present = sorted({name for row in rows for name in row if name != "nimg"})
        raise ValueError(f"no row holds a finite {key!r}; the {len(rows)} rows hold {present}")
    return tuple(np.asarray(column, dtype=np.float64) for column in zip(*points, strict=True))


def _draw_panel(panel: Any, rows: Sequence[Mapping[str, Any]], key: str) -> None:
    """Every number that the rows hold under the key, and its running mean. panel: matplotlib's Axes."""
    nimg, values = _points(rows, key)
    window = len(values) // 40 * 2 + 1
    smooth = running_mean(values, window)
    panel.plot(nimg, values, color="#4878a8", alpha=0.35, linewidth=0.8, label=f"each of {len(values)} logged values")
    panel.plot(nimg, smooth, color="#1f4e79", linewidth=1.8, label=f"mean over {window} values")
    low, high = values.min(), max(np.percentile(values, 99), smooth.max())
    room = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    panel.set_ylim(low - room, high + room)
    _finish_panel(panel, key)


def _draw_lines(panel: Any, rows: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> None:
    """Several numbers that are measured now and then, each as a line through its points."""
    for key in keys:
        panel.plot(*_points(rows, key), marker="o", markersize=3, linewidth=1.4, label=key.replace("_", " "))
    _finish_panel(panel, keys[0])


def _finish_panel(panel: Any, key: str) -> None:
    panel.set_xlabel("images seen")
    panel.set_ylabel(key.replace("_", " "))
    panel.grid(alpha=0.2)
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False, fontsize="small")


def save_curves(
    rows: Iterable[Mapping[str, Any]],
    path: str | Path,
    *,
    keys: Sequence[str] = ("loss",),
    lines: Sequence[str] = (),
    title: str = "",
) -> Path:
    """Draw named numbers over images seen, one panel a key and one of all `lines` together, as a PNG.

    rows: as read_metrics gives them. A row without a key, or whose number is not finite (a skipped step), is left out
    of that panel. Returns the path; its folder is made if need be.
    Raises ValueError if a key has no number in any row, ImportError if matplotlib is missing.
    """
    FigureCanvasAgg, Figure = png_figures()
    from matplotlib.ticker import EngFormatter

    rows = list(rows)
    count = len(keys) + bool(lines)
    figure = Figure(figsize=(7.5, 3.4 * count), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    panels = figure.subplots(count, squeeze=False, sharex=bool(lines))[:, 0]
    for panel, key in zip(panels, keys, strict=False):
        _draw_panel(panel, rows, key)
    if lines:
        _draw_lines(panels[-1], rows, lines)
    for panel in panels:
        panel.xaxis.set_major_formatter(EngFormatter(sep=""))
    figure.suptitle(title)
    path = Path(path)
    with replaced(path) as work:
        canvas.print_png(work)
    return path
