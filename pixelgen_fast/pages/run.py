"""report.html of a run: what it was told, how it went, what it draws. One file that needs no other."""

from __future__ import annotations

import html
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from pixelgen_fast.atomic import replaced
from pixelgen_fast.errors import InputError
from pixelgen_fast.eval.curves import read_metrics, with_measured
from pixelgen_fast.pages.panels import MOST_POINTS, Row, curves, where_time_went
from pixelgen_fast.pages.pictures import data_url, grids
from pixelgen_fast.pages.settings import settings_table
from pixelgen_fast.pages.template import as_json, fill, table
from pixelgen_fast.runs.folder import RunFolder
from pixelgen_fast.runs.plain import read_object


def write_report(folder: RunFolder, defaults: Mapping[str, Any] | None, out: Path | None = None) -> Path:
    """Write the page of a run, a file of about as many bytes as its grids; returns where it is.

    defaults: of its configuration; None where they are not known. out: default RUN/report.html.
    Raises InputError for a folder that holds no metrics, or none that can be read.
    """
    rows = _rows(folder)
    found = curves(rows)
    pictures, said = grids(folder, rows[-1]["nimg"])
    values = _configuration(folder)
    thinned = f" Each point is the mean of {found.each} rows: a page shows {MOST_POINTS:,}." if found.each > 1 else ""
    data = {
        "columns": found.columns,
        "panels": [asdict(panel) for panel in found.panels],
        "events": found.events,
        "grids": [{"nimg": grid.nimg, "png": grid.source} for grid in pictures],
    }
    page = fill(
        "run.html",
        name=html.escape(folder.root.resolve().name),
        summary=_summary(rows, values, folder),
        time=_time_bar(rows),
        thinned=thinned,
        events=_events(found.events),
        grids_note=html.escape(said),
        no_grids="" if pictures else "There are no grids in this folder yet.",
        evaluation=_evaluation(folder),
        settings=settings_table(values, defaults) or "<p>There is no config.yaml in this folder.</p>",
        defaults_note="" if defaults is not None else "The defaults of this configuration are not known here.",
        data=as_json(data),
    )
    out = out or folder.report
    with replaced(out) as work:
        work.write_text(page, encoding="utf-8")
    return out


def _rows(folder: RunFolder) -> list[Row]:
    if not folder.metrics.is_file():
        raise InputError(f"{folder.root} holds no {folder.metrics.name}; give the folder of a run, once it has a row")
    try:
        rows = with_measured(read_metrics(folder.metrics))
        pauses = read_metrics(folder.pauses) if folder.pauses.is_file() and folder.pauses.stat().st_size else []
    except (ValueError, OSError) as error:
        raise InputError(str(error)) from error
    beside = {row["nimg"]: row for row in pauses}
    rows = [beside.get(row["nimg"], {}) | row for row in rows]
    return [{name: value for name, value in row.items() if isinstance(value, int | float)} for row in rows]


def _configuration(folder: RunFolder) -> dict[str, Any]:
    """What config.yaml holds; nothing where it cannot be read."""
    try:
        values = yaml.safe_load(folder.config.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return values if isinstance(values, dict) else {}


def _summary(rows: Sequence[Row], values: Mapping[str, Any], folder: RunFolder) -> str:
    """Figures in large type, each with what it is."""
    last, train = rows[-1], values.get("train") or {}
    total = train.get("images")
    rates = sorted(row["images_per_second"] for row in rows if row.get("images_per_second"))
    done = f"of {total:,} images" if isinstance(total, int) else "images"
    told = [(f"{last['nimg']:,}", done)]
    if isinstance(loss := last.get("loss"), float):
        told.append((f"{loss:.4g}", "loss, last row"))
    if rates:
        told.append((f"{rates[len(rates) // 2]:,.0f}", "images a second, median"))
    told.append((spoken_seconds(sum(where_time_went(rows).values())), "in the logged intervals"))
    if last.get("memory_bytes"):
        told.append((f"{last['memory_bytes'] / 1e9:.2f} GB", "peak memory"))
    system = (values.get("model") or {}).get("system")
    about = [str(system)] if system else []
    about += [str(folder.root), f"page made {time.strftime('%Y-%m-%d %H:%M')}"]
    cards = "".join(f"<div><b>{html.escape(figure)}</b><span>{html.escape(what)}</span></div>" for figure, what in told)
    return f'<p class="about">{html.escape(" · ".join(about))}</p><div class="figures">{cards}</div>'


def _time_bar(rows: Sequence[Row]) -> str:
    """Where the time of all logged intervals went, as one bar with its legend."""
    spent = {name: seconds for name, seconds in where_time_went(rows).items() if seconds > 0}
    whole = sum(spent.values())
    if not whole:
        return ""
    bar = "".join(
        f'<i style="width:{100 * seconds / whole:.3f}%" class="part{k}"></i>'
        for k, seconds in enumerate(spent.values())
    )
    legend = "".join(
        f'<span><i class="part{k}"></i>{html.escape(name)} {seconds / whole:.1%}, {spoken_seconds(seconds)}</span>'
        for k, (name, seconds) in enumerate(spent.items())
    )
    after = "Of all logged intervals: the last checkpoint and grid of a run come after its last row."
    return f'<div class="bar" title="{after}">{bar}</div><div class="legend">{legend}</div>'


def _events(found: Sequence[tuple[int, str]]) -> str:
    if not found:
        return ""
    shown = "".join(f"<li>image {nimg:,}: {html.escape(what)}</li>" for nimg, what in found[-200:])
    return f"<details><summary>Events<span class='note'>{len(found)}</span></summary><ul>{shown}</ul></details>"


def _evaluation(folder: RunFolder) -> str:
    """What `pixelgen evaluate` has found, as it stands in evaluation.json, and its sweep."""
    found, sweep = _object(folder.evaluation), _sweep(folder)
    if not found and not sweep:
        return f"<p>Not evaluated yet: <code>pixelgen evaluate {html.escape(str(folder.root))}</code></p>"
    parts = []
    for title in ("report", "settings", "drawing"):
        if isinstance(part := found.get(title), dict) and part:
            lines = [[name.replace("_", " "), _number(value)] for name, value in part.items()]
            parts.append(f"<div><h3>{title.capitalize()}</h3>{table(lines)}</div>")
    return f'<div class="beside">{"".join(parts)}</div>{sweep}'


def _sweep(folder: RunFolder) -> str:
    """The table and the picture of `pixelgen evaluate --sweep`; nothing where there is none that can be read."""
    found = _object(folder.sweep).get("points")
    points = [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []
    points = [one for one in points if all(isinstance(one.get(part), dict) for part in ("point", "figures"))]
    if not points:
        return ""
    parts = {part: [*dict.fromkeys(name for one in points for name in one[part])] for part in ("point", "figures")}
    head = [name for names in parts.values() for name in names]
    rows = [[_number(one[part].get(name)) for part, names in parts.items() for name in names] for one in points]
    try:
        picture = f'<img class="sweep" alt="the same, drawn" src="{data_url(folder.sweep_picture.read_bytes())}">'
    except OSError:  # of a sweep that was stopped
        picture = ""
    return f"<h3>Sweep</h3>{table(rows, head)}{picture}"


def _object(file: Path) -> dict[str, Any]:
    """The JSON object in a file; an empty one where there is none that can be read."""
    try:
        return read_object(file)
    except (OSError, ValueError):
        return {}


def _number(value: Any) -> str:
    """A figure of an evaluation, short."""
    match value:
        case bool() | None | str():
            return "none" if value is None else str(value)
        case int():
            return f"{value:,}"
        case float():
            return f"{value:.4g}"
        case list() if all(isinstance(one, int | float) for one in value):
            return ", ".join(_number(one) for one in value)
        case dict():
            return " · ".join(f"{name}: {_number(one)}" for name, one in value.items())
    return json.dumps(value)


def spoken_seconds(seconds: float) -> str:
    """As 42 s, 12 min or 3.4 h."""
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"
