"""A plan as one HTML file that needs no other: the tables, and the charts as SVG inside it."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

from pixelgen_fast.atomic import replaced
from pixelgen_fast.pages import template
from pixelgen_fast.planning import charts
from pixelgen_fast.planning.changes import Change
from pixelgen_fast.planning.content import Table, heading, sources, tables
from pixelgen_fast.planning.estimate import CASES, Estimate

STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:1000px;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:.5em 0;font-variant-numeric:tabular-nums}
th,td{padding:.2em .8em;border-bottom:1px solid #ddd;text-align:right;white-space:nowrap}
th{font-weight:600;vertical-align:bottom;white-space:normal}th:first-child,td:first-child{text-align:left}
figure{margin:1em 0}figcaption{font-weight:600}svg{max-width:100%;height:auto}
.note{color:#555;font-size:.9em;margin:.2em 0}
.facts{display:flex;gap:2.5em;flex-wrap:wrap;margin:1.2em 0}.facts b{display:block;font-size:1.7em;line-height:1.2}
.facts span{color:#555;font-size:.9em}.warning{background:#fde8e0;padding:.6em 1em;border-left:4px solid #c1440e}"""


def write_page(e: Estimate, changes: Sequence[Change], name: str, path: Path) -> None:
    """Write the page of a plan. name: of the configuration."""
    figures = [
        ("Time of a step by part", charts.stacked(e)),
        ("Roofline: the operations with matrix products, the area being their time", charts.roofline(e)),
    ]
    if e.scales:
        title = "From 1 to 1,024 GPUs, each with the same images, eight a node; right: share of one GPU alone"
        figures.append((title, charts.scaling(e)))
    found = {table.title: table for table in tables(e, list(changes))}
    first, *rest = found.values()
    body = [
        f"<h1>Plan of {html.escape(name)}</h1>", f"<p>{html.escape(heading(e))}</p>", _facts(e), _table(first),
        *(_figure(*figure) for figure in figures), *(_table(table) for table in rest), "<h2>Sources</h2><ul>",
        *(f"<li>{html.escape(line)}</li>" for line in sources(e)), "</ul>",
    ]  # fmt: skip
    with replaced(path) as work:
        work.write_text(template.document(f"Plan of {name}", STYLE, body))


def _facts(e: Estimate) -> str:
    images = e.step.config.train.images
    hours = [e.hours(case, images) for case in CASES]
    share = e.share("planned")
    facts = [
        (f"{hours[1]:,.1f} h", f"planned; {hours[0]:,.1f} at the floor, {hours[2]:,.1f} pessimistic"),
        (f"{e.images_per_second('planned'):,.0f}", "images/s of a GPU, planned"),
        ("not known" if share is None else f"{share:.0%}", "MFU, planned"),
        (f"{e.memory(e.stage) / 1e9:.0f} GB", "memory of each GPU"),
    ]
    cells = "".join(f"<div><b>{html.escape(big)}</b><span>{html.escape(small)}</span></div>" for big, small in facts)
    warning = "" if e.fits() else '<p class="warning">The run as configured does not fit in memory.</p>'
    return f'<div class="facts">{cells}</div>{warning}'


def _table(table: Table) -> str:
    rows = [template.table(table.rows, table.head)] if table.rows else []
    notes = [f'<p class="note">{html.escape(note)}</p>' for note in table.notes]
    return "\n".join([f"<h2>{html.escape(table.title)}</h2>", *rows, *notes])


def _figure(title: str, svg: str) -> str:
    return f"<figure><figcaption>{html.escape(title)}</figcaption>{svg}</figure>"
