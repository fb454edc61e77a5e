"""The page of a comparison: one HTML file that holds its pictures, and the same in Markdown beside them."""

from __future__ import annotations

import html
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pixelgen_fast.compare.figures import draw_curves, draw_quality
from pixelgen_fast.compare.reading import Ground, Section, read
from pixelgen_fast.compare.results import PIXELS, Variant, collect
from pixelgen_fast.compare.schema import Compare, slug
from pixelgen_fast.pages.pictures import data_url
from pixelgen_fast.pages.template import document, table
from pixelgen_fast.runs.folder import RunFolder

STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:1100px;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse}th,td{padding:.25em .8em;border-bottom:1px solid #ddd;text-align:right}
th:first-child,td:first-child,th:nth-child(2),td:nth-child(2){text-align:left}img{max-width:100%}
figure{display:inline-block;margin:.5em}figcaption{font-weight:600}"""
COLUMNS = (
    "system", "generates", "right class", "Fréchet distance", "flow loss", "alignment loss", "images/s", "train, s",
    "draw, ms an image", "parameters",
)  # fmt: skip

Picture = tuple[str, Path]


@dataclass(frozen=True)
class Content:
    """What stands on the page, from top to bottom."""

    intro: str
    table: list[tuple[str, ...]]
    reading: list[Section]
    curves: list[Picture]
    grids: list[Picture]


def write_page(compare: Compare) -> Path:
    """Write page.html into the comparison's folder, and page.md with its pictures/; returns the HTML file."""
    folder = Path(compare.dir)
    variants, real = collect(compare)
    ground, pictures = Ground.of(compare, real), folder / "pictures"
    grids = [(variant.name, pictures / f"samples_{slug(variant.name)}.png") for variant in variants]
    curves = _curves(variants, pictures)
    for variant, (_, grid) in zip(variants, grids, strict=True):
        shutil.copyfile(RunFolder(variant.folders[0]).final, grid)
    content = Content(
        intro=introduction(compare, variants, ground),
        table=[row(variant, ground) for variant in variants],
        reading=read(variants, ground),
        curves=curves,
        grids=grids,
    )
    (folder / "page.md").write_text(markdown(content, folder))
    out = folder / "page.html"
    out.write_text(page(content))
    return out


def _curves(variants: Sequence[Variant], pictures: Path) -> list[Picture]:
    found = [("How far each gets", draw_quality(variants, pictures / "quality.png"))]
    # losses of latents, or of pieces, are other quantities
    if flows := [variant for variant in variants if variant.kind == PIXELS]:
        found.append(("Flow-matching loss of pixels", draw_curves(flows, None, pictures / "flow.png")))
    if any(variant.alignment.values for variant in variants):
        aligned = draw_curves(variants, "loss_alignment", pictures / "alignment.png")
        found.append(("Alignment loss, 1 - cos", aligned))
    return found


def introduction(compare: Compare, variants: Sequence[Variant], ground: Ground) -> str:
    seeds, real = len(compare.seeds), ground.real
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
    if r := ground.prepared.get("teacher"):
        intro += (
            f" The teacher was trained without labels on {r['trained_on']} of the images, in {r['seconds']:.0f} s that "
            f"images/s leaves out: {r['neighbours']} nearest neighbours find the class of {r['knn_class']:.1%} of "
            f"{r['held_out']} others by its class tokens, {r['knn_patches']:.1%} by the mean of its patch tokens, "
            f"{r['knn_pixels']:.1%} by pixels."
        )
    if r := ground.prepared.get("decoder"):
        intro += f" The decoder of its features to pixels was trained in {r['seconds']:.0f} s."
    return intro


def row(v: Variant, ground: Ground) -> tuple[str, ...]:
    return (
        v.name, v.kind, v.accuracy.text(".1%"), v.frechet.text(".1f"),
        v.flow.text(".4f") if v.kind == PIXELS else "", v.alignment.text(".3f"), v.images_per_second.text(".0f"),
        f"{ground.seconds(v):.0f}", v.draw_ms.text(".1f"), f"{v.parameters:,}",
    )  # fmt: skip


def markdown(content: Content, folder: Path) -> str:
    lines = [
        "# Comparison",
        "",
        content.intro,
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|---|---" + "|--:" * (len(COLUMNS) - 2) + "|",
    ]
    lines += ["| " + " | ".join(cells) + " |" for cells in content.table]
    for heading, said in content.reading:
        lines += ["", f"## {heading}", "", *(f"- {line}" for line in said)]
    for title, path in [*content.curves, *((f"{name}: samples", path) for name, path in content.grids)]:
        lines += ["", f"## {title}", "", f"![{title}]({path.relative_to(folder)})"]
    return "\n".join(lines) + "\n"


def page(content: Content) -> str:
    def picture(title: str, path: Path) -> str:
        caption = html.escape(title)
        image = f'<img alt="{caption}" src="{data_url(path.read_bytes())}">'
        return f"<figure><figcaption>{caption}</figcaption>{image}</figure>"

    def section(heading: str, said: Sequence[str]) -> str:
        items = "".join(f"<li>{html.escape(line)}</li>" for line in said)
        return f"<h2>{html.escape(heading)}</h2><ul>{items}</ul>"

    body = [
        "<h1>Comparison</h1>", f"<p>{html.escape(content.intro)}</p>",
        table(content.table, COLUMNS),
        *(section(*one) for one in content.reading),
        "<h2>Curves</h2>", *(picture(*curve) for curve in content.curves),
        "<h2>Samples on the same noise</h2>", *(picture(*grid) for grid in content.grids),
    ]  # fmt: skip
    return document("Comparison", STYLE, body)
