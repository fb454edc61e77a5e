"""The picture of a sweep: a panel for each figure, the longest numeric axis to the right, a line for all else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pixelgen_fast.atomic import replaced
from pixelgen_fast.eval.curves import png_figures

_COLUMNS = 3


def across(axes: Mapping[str, Sequence[Any]]) -> str:
    """The key that goes to the right: the one with most values, of those that are numbers where there are any."""
    numeric = [key for key, values in axes.items() if all(isinstance(v, (int, float)) for v in values)]
    return max(numeric or axes, key=lambda key: len(axes[key]))


def draw(path: Path, axes: Mapping[str, Sequence[Any]], found: Sequence[Mapping[str, Any]]) -> Path:
    """Write the picture. found: points with their `point` and `figures`. Returns the path."""
    canvas_of, figure_of = png_figures()
    names = [name for name in found[0]["figures"] if any(e["figures"].get(name) is not None for e in found)]
    columns = min(len(names), _COLUMNS)
    rows = -(-len(names) // columns)
    figure = figure_of(figsize=(4.2 * columns, 3.4 * rows), layout="constrained")
    canvas = canvas_of(figure)
    key = across(axes)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel, name in zip(panels, names, strict=False):
        _panel(panel, key, axes[key], found, name)
    for panel in panels[len(names) :]:
        panel.set_visible(False)
    handles, labels = panels[0].get_legend_handles_labels()
    if len(labels) > 1:
        figure.legend(handles, labels, loc="outside lower center", ncols=min(columns, len(labels)), frameon=False)
    with replaced(path) as work:
        canvas.print_png(work)
    return path


def _panel(panel: Any, key: str, values: Sequence[Any], found: Sequence[Mapping[str, Any]], name: str) -> None:
    """One figure over one key; values that are no numbers stand side by side."""
    numeric = all(isinstance(value, (int, float)) for value in values)
    lines: dict[str, list[tuple[float, float]]] = {}
    for entry in found:
        value, figure = entry["point"][key], entry["figures"].get(name)
        rest = ", ".join(f"{k} {value_text(v)}" for k, v in entry["point"].items() if k != key)
        if figure is not None:
            place = value if numeric else [value_text(v) for v in values].index(value_text(value))
            lines.setdefault(rest, []).append((place, figure))
    for rest, line in lines.items():
        panel.plot(*zip(*sorted(line), strict=True), marker="o", markersize=4, linewidth=1.4, label=rest)
    if not numeric:
        panel.set_xticks(range(len(values)), [value_text(v) for v in values])
    panel.set_xlabel(key)
    panel.set_ylabel(name)
    panel.grid(alpha=0.2)
    panel.spines[["top", "right"]].set_visible(False)


def value_text(value: Any) -> str:
    if value is None:
        return "none"
    return ":".join(f"{v:g}" for v in value) if isinstance(value, (list, tuple)) else str(value)
