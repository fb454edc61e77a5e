"""The pictures of a comparison: losses against images, and how good a variant is against what it took."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pixelgen_fast.compare.results import Variant, flow_key
from pixelgen_fast.eval.curves import png_figures, running_mean

COLOURS = (
    "#1f4e79", "#c1440e", "#2e7d32", "#7b3f99", "#b8860b", "#444444", "#008b8b", "#a0522d", "#d81b60", "#6b8e23",
    "#4682b4", "#000000",
)  # fmt: skip
MARKERS = "osD^vP*X<>ph"


def _smoothed(variant: Variant, key: str | None) -> tuple[list[int], np.ndarray]:
    """Images seen, and the loss at them [seeds, rows], up to the shortest run's end."""
    lines = []
    for rows in variant.rows:
        column = key or flow_key(rows)
        values = np.array([row[column] for row in rows if row.get(column) is not None])
        lines.append(running_mean(values, len(values) // 20 * 2 + 1))
    count = min(map(len, lines))
    return [row["nimg"] for row in variant.rows[0]][:count], np.stack([line[:count] for line in lines])


def draw_curves(variants: Sequence[Variant], key: str | None, path: Path) -> Path:
    """One line a variant that has the loss, the mean of its seeds, in a band from the least to the greatest.

    key: a column of the metrics, None for the flow-matching loss.
    """
    FigureCanvasAgg, Figure = png_figures()
    from matplotlib.ticker import LogLocator, NullLocator, ScalarFormatter

    figure = Figure(figsize=(9, 4.2), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots()
    for number, variant in enumerate(variants):
        if key and key not in variant.rows[0][-1]:
            continue
        nimg, stack = _smoothed(variant, key)
        colour = COLOURS[number % len(COLOURS)]
        axes.plot(nimg, stack.mean(axis=0), color=colour, label=variant.name, linewidth=1.6)
        axes.fill_between(nimg, stack.min(axis=0), stack.max(axis=0), color=colour, alpha=0.15, linewidth=0)
    # the first steps are far above the rest and would flatten it
    late = [value for line in axes.lines for value in line.get_ydata()[len(line.get_ydata()) // 10 :]]
    axes.set_yscale("log")
    axes.set_ylim(0.95 * min(late), 1.05 * max(late))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("images seen")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.2)
    axes.legend(frameon=False, fontsize="small", ncols=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.print_png(path)
    return path


def draw_quality(variants: Sequence[Variant], path: Path) -> Path:
    """Fréchet distance against images, seconds of training and parameters; a line a variant, where it was judged.

    Means over seeds, bars from the least to the greatest.
    """
    FigureCanvasAgg, Figure = png_figures()
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    panels = figure.subplots(1, 3, sharey=True)
    for number, v in enumerate(variants):
        style = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)], "markersize": 6}
        distances = [point.frechet for point in v.points]
        means = [spread.mean for spread in distances]
        bars = [[m - min(s.values), max(s.values) - m] for m, s in zip(means, distances, strict=True)]
        places = (
            [point.nimg for point in v.points],
            [point.seconds.mean for point in v.points],
            [v.parameters / 1e6],
        )
        for panel, x in zip(panels, places, strict=True):
            n = len(x)
            panel.errorbar(x, means[-n:], np.array(bars[-n:]).T, **style, linewidth=1.2, capsize=2, label=v.name)
    for panel, title in zip(panels, ("images seen", "seconds of training", "million parameters"), strict=True):
        _finish(panel, title)
    panels[0].set_ylabel("Fréchet distance, lower is better")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.print_png(path)
    return path


def _finish(panel: Any, title: str) -> None:
    panel.set_xlabel(title)
    panel.set_yscale("log")
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(alpha=0.2, which="both")
