"""The folder that `pixelgen sample` writes: an image is a file as soon as it is drawn.

<out>/<class>/000000.png ...   number of the sample       grid.png    the first images of the first classes
      drawn.json               classes and how many of each: by this file an earlier folder of this kind is known
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from pixelgen_fast.atomic import replaced
from pixelgen_fast.errors import InputError
from pixelgen_fast.eval.grid import save_grid
from pixelgen_fast.runs.folder import names_a_folder

LIST, GRID = "drawn.json", "grid.png"
GRID_ROWS, GRID_COLUMNS = 32, 16


class DrawnFolder:
    """check, describe, begin, write every batch, finish. Of several processes one checks, begins and finishes."""

    def __init__(self, root: Path) -> None:
        self.root, self.earlier = root, _earlier(root / LIST)
        self.classes: list[str] = []
        self.per_class = 0
        self.shown: dict[int, np.ndarray] = {}

    def check(self, overwrite: bool) -> None:
        """Raise InputError where the folder holds something, but with `overwrite` images of an earlier command."""
        if self.root.is_file():
            raise InputError(f"{self.root} is a file; --out names a folder")
        if not self.root.is_dir() or not any(self.root.iterdir()):
            return
        if not self.earlier:
            raise InputError(f"{self.root} holds other files already; choose another folder with --out")
        if not overwrite:
            raise InputError(
                f"{self.root} holds the images of an earlier command; choose another folder with --out, or replace "
                "them with --overwrite"
            )

    def describe(self, classes: list[str], per_class: int) -> None:
        """What will be drawn. classes: in the order in which images come."""
        self.classes, self.per_class = classes, per_class

    def begin(self) -> None:
        """Remove an earlier command's images and take the folder."""
        for name in self.earlier:
            shutil.rmtree(self.root / name, ignore_errors=True)
        (self.root / GRID).unlink(missing_ok=True)
        self.root.mkdir(parents=True, exist_ok=True)
        about = {"classes": self.classes, "per_class": self.per_class}
        (self.root / LIST).write_text(json.dumps(about, indent=1) + "\n")

    def write(self, numbers: Iterable[int], images: np.ndarray) -> None:
        """Images uint8 [N, H, W, 3] and their numbers [N]."""
        for number, image in zip(numbers, images, strict=True):
            row, column = divmod(number, self.per_class)
            with replaced(self.root / self.classes[row] / f"{number:06d}.png") as work:
                Image.fromarray(image).save(work, format="PNG")
            if row < GRID_ROWS and column < GRID_COLUMNS:
                self.shown[number] = image

    def finish(self, shown: dict[int, np.ndarray]) -> str:
        """Write the grid. shown: of all processes. Returns a line that says what is where."""
        rows, columns = self.classes[:GRID_ROWS], min(self.per_class, GRID_COLUMNS)
        images = np.stack([shown[number] for number in sorted(shown)])
        grid = save_grid(images, self.root / GRID, columns=columns, row_titles=rows)
        count = len(self.classes) * self.per_class
        part = "all" if len(shown) == count else f"{len(shown):,}"
        return f"{count:,} images in {self.root}, {part} of them on {grid}"


def _earlier(path: Path) -> list[str]:
    """The classes whose images an earlier command wrote; none where it is no such folder."""
    try:
        classes = json.loads(path.read_text())["classes"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [name for name in classes if names_a_folder(name)]
