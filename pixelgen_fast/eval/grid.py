"""Sample grids: images in rows and columns with a gap between them, each row and column named, as one PNG.

Small images are enlarged by a whole factor with nearest neighbour, so that a person sees every pixel as it is.

Shapes: N images uint8 [N, H, W, 3], filled row by row.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from pixelgen_fast.atomic import replaced

_BACKGROUND, _INK = (255, 255, 255), (40, 40, 40)
_FONT_SIZE, _MARGIN = 14, 8


def _check_layout(
    rows: int, columns: int, gap: int, scale: int, row_titles: Sequence[str], column_titles: Sequence[str]
) -> None:
    if columns < 1:
        raise ValueError(f"a grid needs at least 1 column, got {columns}")
    if gap < 0:
        raise ValueError(f"the gap between images must be 0 or more pixels, got {gap}")
    for name, titles, wanted in (("row", row_titles, rows), ("column", column_titles, columns)):
        if titles and len(titles) != wanted:
            raise ValueError(f"{wanted} {name}s need {wanted} {name} titles, got {len(titles)}: {list(titles)}")
    if scale < 1:
        raise ValueError(f"scale must be a whole enlargement of at least 1, got {scale}")


def _draw(
    images: np.ndarray,
    columns: int,
    row_titles: Sequence[str],
    column_titles: Sequence[str],
    title: str,
    gap: int,
    scale: int,
) -> Image.Image:
    rows = -(-len(images) // columns)
    font = ImageFont.load_default(_FONT_SIZE)
    line = _FONT_SIZE + _MARGIN
    left = gap + (max(int(font.getlength(t)) for t in row_titles) + _MARGIN if row_titles else 0)
    top = gap + line * (bool(title) + bool(column_titles))
    cell_h, cell_w = images.shape[1] * scale, images.shape[2] * scale
    grid_w = left + columns * (cell_w + gap)
    title_w = gap + int(font.getlength(title)) + _MARGIN if title else 0
    page = Image.new("RGB", (max(grid_w, title_w), top + rows * (cell_h + gap)), _BACKGROUND)
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        cell = Image.fromarray(image).resize((cell_w, cell_h), Image.Resampling.NEAREST)
        page.paste(cell, (left + column * (cell_w + gap), top + row * (cell_h + gap)))

    pen = partial(ImageDraw.Draw(page).text, fill=_INK, font=font)
    pen((gap + _MARGIN // 2, line // 2), title, anchor="lm")
    for i, text in enumerate(column_titles):
        pen((left + i * (cell_w + gap) + cell_w // 2, top - gap - line // 2), text, anchor="mm")
    for i, text in enumerate(row_titles):
        pen((left - _MARGIN // 2, top + i * (cell_h + gap) + cell_h // 2), text, anchor="rm")
    return page


def save_grid(
    images: Tensor | np.ndarray,
    path: str | Path,
    *,
    columns: int,
    row_titles: Sequence[str] = (),
    column_titles: Sequence[str] = (),
    title: str = "",
    gap: int = 4,
    scale: int | None = None,
) -> Path:
    """Write images as a PNG grid.

    images: uint8 [N, H, W, 3], N >= 1; the last row may be short. columns: images a row.
    row_titles, column_titles: names of the rows (left) and columns (above), the classes as a rule; empty for none, else
    one each. title: a line above everything. gap: pixels of the file between images.
    scale: whole enlargement; None takes the smallest that makes an image at least 64 pixels wide and high.
    Returns the path; its folder is made if need be, and an earlier picture is replaced whole. Raises ValueError for
    another dtype or shape, or titles that do not match the rows or columns.
    """
    images = _as_array(images)
    count, height, width, _ = images.shape
    scale = max(1, -(-64 // min(height, width))) if scale is None else scale
    rows = -(-count // max(1, columns))
    _check_layout(rows, columns, gap, scale, row_titles, column_titles)

    page = _draw(images, columns, row_titles, column_titles, title, gap, scale)
    path = Path(path)
    with replaced(path) as work:
        page.save(work, format="PNG")
    return path


def _as_array(images: Tensor | np.ndarray) -> np.ndarray:
    array = images.detach().cpu().numpy() if isinstance(images, Tensor) else np.asarray(images)
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[-1] != 3 or 0 in array.shape:
        raise ValueError(f"a grid needs uint8 images [N, H, W, 3], N >= 1; got {array.dtype} {list(array.shape)}")
    return np.ascontiguousarray(array)
