"""The grids of a run, inside the page: as many as fit, evenly picked, each as a PNG of a limited side."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from pixelgen_fast.runs.folder import RunFolder

MOST_GRIDS = 48
LONGEST_SIDE = 1200
MOST_BYTES = 24_000_000  # of all of them


@dataclass(frozen=True)
class Grid:
    """A grid of images: the image of the run at which it was drawn, and its PNG."""

    nimg: int
    png: bytes

    @property
    def source(self) -> str:
        return data_url(self.png)


def data_url(png: bytes) -> str:
    """What an image element takes as its source."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def grids(folder: RunFolder, last: int) -> tuple[list[Grid], str]:
    """Those of samples/, and final.png as the one of image `last`; and what to say where not all of them fit.

    A file that is no picture is left out.
    """
    there = {int(path.stem): path for path in folder.samples(0).parent.glob("*.png") if path.stem.isdecimal()}
    if folder.final.is_file():
        there[last] = folder.final
    files = sorted(there.items())
    for most in (MOST_GRIDS, MOST_GRIDS // 2, MOST_GRIDS // 4, 2, 1):
        found, smaller = _read(spread(files, most))
        if sum(len(grid.png) for grid in found) <= MOST_BYTES:
            break
    said = []
    if most < len(files):
        said.append(f"{len(found)} of {len(files)} grids, evenly picked (a page holds {MOST_GRIDS}, or 24 MB)")
    if smaller:
        said.append(f"reduced to {LONGEST_SIDE:,} pixels on their longer side")
    return found, "; ".join(said)


def spread(items: list, most: int) -> list:
    """At most so many of the items, evenly, the last among them and, from two on, the first."""
    if len(items) <= most:
        return items
    if most == 1:
        return items[-1:]
    return [items[round(k * (len(items) - 1) / (most - 1))] for k in range(most)]


def _read(files: list[tuple[int, Path]]) -> tuple[list[Grid], bool]:
    """The grids, and whether any was reduced."""
    found, smaller = [], False
    for nimg, path in files:
        try:
            with Image.open(path) as picture:
                if reduced := max(picture.size) > LONGEST_SIDE:
                    picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
                out = io.BytesIO()
                picture.save(out, format="PNG", optimize=True)
        except OSError:
            continue
        smaller |= reduced
        found.append(Grid(nimg, out.getvalue()))
    return found, smaller
