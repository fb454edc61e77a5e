"""The page of a comparison: one HTML file that holds its pictures, and the same in Markdown beside them.

Every sentence of the reading is chosen by the numbers: a difference counts as one when each seed shows it.
"""

from __future__ import annotations

import base64
import html
import json
import shutil
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import numpy as np

from pixelgen_fast.compare.results import Spread, Variant, collect, flow_key
from pixelgen_fast.compare.schema import Compare, slug, teacher_folder
from pixelgen_fast.distill.schema import REPORT
from pixelgen_fast.eval.curves import png_figures, running_mean
from pixelgen_fast.runs.folder import RunFolder

COLOURS = ("#1f4e79", "#c1440e", "#2e7d32", "#7b3f99", "#b8860b", "#444444", "#008b8b", "#a0522d")
STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:1100px;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse}th,td{padding:.25em .8em;border-bottom:1px solid #ddd;text-align:right}
th:first-child,td:first-child{text-align:left}img{max-width:100%}figure{display:inline-block;margin:.5em}
figcaption{font-weight:600}"""
COLUMNS = ("system", "right class", "Fréchet distance", "flow loss", "alignment loss", "images/s", "parameters")


def write_page(compare: Compare) -> Path:
    """Write page.html into the comparison's folder, and page.md with its pictures/; returns the HTML file."""
    folder = Path(compare.dir)
    variants, real = collect(compare)
    pictures = folder / "pictures"
    curves = [("Flow-matching loss", draw_curves(variants, None, pictures / "flow.png"))]
    if any(variant.alignment.values for variant in variants):
        curves.append(("Alignment loss, 1 - cos", draw_curves(variants, "loss_alignment", pictures / "alignment.png")))
    grids = [(variant.name, pictures / f"samples_{slug(variant.name)}.png") for variant in variants]
    for variant, (_, grid) in zip(variants, grids, strict=True):
        shutil.copyfile(RunFolder(variant.folders[0]).final, grid)
    seeds = len(compare.seeds)
    intro = (
        f"{len(variants)} systems, {seeds} seed{'s' * (seeds > 1)} each, {variants[0].rows[0][-1]['nimg']:,} images a "
        f"run, {compare.samples:,} generated images judged. Mean over seeds ± half the range. Of real images the judge "
        f"knows {real['classifier_accuracy']:.1%}, and two halves are a Fréchet distance of {real['frechet_real']:.1f} "
        "apart. Grids are of the first seed."
    )
    if seeds > 1:
        intro += f" Where nothing differs, {seeds} seeds agree by chance one time in {2 ** (seeds - 1)}."
    else:
        intro += " One seed cannot tell a difference from chance."
    intro += about_teacher(teacher_folder(compare) / REPORT)
    table = [row(variant) for variant in variants]
    reading = read(variants)
    (folder / "page.md").write_text(markdown(intro, table, reading, curves, grids, folder))
    out = folder / "page.html"
    out.write_text(page(intro, table, reading, curves, grids))
    return out


def about_teacher(report: Path) -> str:
    """What nearest neighbours found with the teacher that the comparison trained; empty where it trained none."""
    if not report.is_file():
        return ""
    r = json.loads(report.read_text())
    return (
        f" The teacher was trained without labels on {r['trained_on']} of the images, in {r['seconds']:.0f} s that the "
        f"speeds below leave out: {r['neighbours']} nearest neighbours find the class of {r['knn_class']:.1%} of "
        f"{r['held_out']} others by its class tokens, {r['knn_patches']:.1%} by the mean of its patch tokens, "
        f"{r['knn_pixels']:.1%} by pixels."
    )


def row(v: Variant) -> tuple[str, ...]:
    return (
        v.name, v.accuracy.text(".1%"), v.frechet.text(".1f"), v.flow.text(".4f"), v.alignment.text(".3f"),
        v.images_per_second.text(".0f"), f"{v.parameters:,}",
    )  # fmt: skip


def read(variants: Sequence[Variant]) -> list[str]:
    """The three questions, each with what the numbers say."""
    base, others = variants[0], list(variants[1:])
    return [
        "Does alignment (REPA) help here? " + _alignment_helps(base, others),
        "Does a lower alignment loss give better pixels? " + _lower_alignment(variants),
        "What does each cost? " + _cost(base, others),
    ]


def versus(a: Spread, b: Spread, form: str) -> str:
    """How a quantity of one variant compares with another's, seed by seed."""
    lower = sum(x < y for x, y in zip(a.values, b.values, strict=True))
    higher = sum(x > y for x, y in zip(a.values, b.values, strict=True))
    n = len(a.values)
    means = f"{a.mean:{form}} against {b.mean:{form}}"
    if n == 1:
        return f"{means} with one seed"
    if n in (lower, higher):
        return f"{'lower' if lower else 'higher'} with every one of {n} seeds ({means})"
    return f"lower with {lower} and higher with {higher} of {n} seeds ({means}): no clear difference"


def _pixels(a: Variant, b: Variant) -> str:
    return (
        f"Fréchet distance {versus(a.frechet, b.frechet, '.1f')}; right class {versus(a.accuracy, b.accuracy, '.1%')}"
    )


def _alignment_helps(base: Variant, others: Sequence[Variant]) -> str:
    plain = [v for v in others if v.alignment.values and v.parameters == base.parameters]
    if not plain:
        return f"No variant is {base.name} with nothing but an alignment added."
    return " ".join(f"{v.name} against {base.name}: {_pixels(v, base)}." for v in plain)


def _lower_alignment(variants: Sequence[Variant]) -> str:
    """Every two aligned variants, that with the lower alignment loss first."""
    aligned = sorted((v for v in variants if v.alignment.values), key=lambda v: v.alignment.mean)
    if len(aligned) < 2:
        return "Fewer than two variants have an alignment loss."
    said = [
        f"{a.name} against {b.name}: alignment loss {versus(a.alignment, b.alignment, '.3f')}; {_pixels(a, b)}."
        for a, b in combinations(aligned, 2)
    ]
    return " ".join(said)


def _cost(base: Variant, others: Sequence[Variant]) -> str:
    def cost(v: Variant) -> str:
        pairs = zip(base.images_per_second.values, v.images_per_second.values, strict=True)
        time = Spread(tuple(own / other for own, other in pairs)).text(".2f")
        return f"{v.name} {time} times its time an image, {v.parameters / base.parameters:.2f} times its weights"

    return f"Against {base.name} on this machine, seed by seed: " + "; ".join(cost(v) for v in others) + "."


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


def markdown(
    intro: str, table: Sequence[tuple[str, ...]], reading: Sequence[str], curves: Sequence[tuple[str, Path]],
    grids: Sequence[tuple[str, Path]], folder: Path,
) -> str:  # fmt: skip
    lines = [
        "# Comparison",
        "",
        intro,
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|---" + "|--:" * (len(COLUMNS) - 1) + "|",
    ]
    lines += ["| " + " | ".join(cells) + " |" for cells in table]
    lines += ["", "## Reading", "", *(f"- {line}" for line in reading)]
    for title, path in [*curves, *((f"{name}: samples", path) for name, path in grids)]:
        lines += ["", f"## {title}", "", f"![{title}]({path.relative_to(folder)})"]
    return "\n".join(lines) + "\n"


def page(
    intro: str, table: Sequence[tuple[str, ...]], reading: Sequence[str], curves: Sequence[tuple[str, Path]],
    grids: Sequence[tuple[str, Path]],
) -> str:  # fmt: skip
    def cells(tag: str, values: Sequence[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(value)}</{tag}>" for value in values) + "</tr>"

    def picture(title: str, path: Path) -> str:
        data = base64.b64encode(path.read_bytes()).decode()
        caption = html.escape(title)
        image = f'<img alt="{caption}" src="data:image/png;base64,{data}">'
        return f"<figure><figcaption>{caption}</figcaption>{image}</figure>"

    body = [
        "<h1>Comparison</h1>", f"<p>{html.escape(intro)}</p>",
        "<table>", cells("th", COLUMNS), *(cells("td", values) for values in table), "</table>",
        "<h2>Reading</h2><ul>", *(f"<li>{html.escape(line)}</li>" for line in reading), "</ul>",
        "<h2>Curves</h2>", *(picture(*curve) for curve in curves),
        "<h2>Samples on the same noise</h2>", *(picture(*grid) for grid in grids),
    ]  # fmt: skip
    head = f'<meta charset="utf-8"><title>Comparison</title><style>{STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>\n' + "\n".join(body) + "\n</body></html>\n"
