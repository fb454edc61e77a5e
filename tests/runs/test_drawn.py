"""The folder that `pixelgen sample` writes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pixelgen_fast.errors import InputError
from pixelgen_fast.runs import drawn
from pixelgen_fast.runs.drawn import DrawnFolder


def images(count: int) -> np.ndarray:
    return np.arange(count, dtype=np.uint8)[:, None, None, None] + np.zeros((1, 4, 4, 3), np.uint8)


def written(root: Path, classes: list[str], per_class: int, overwrite: bool = False) -> str:
    folder = DrawnFolder(root)
    folder.check(overwrite)
    folder.describe(classes, per_class)
    folder.begin()
    count = len(classes) * per_class
    for numbers in np.array_split(np.arange(count), 3):
        folder.write(numbers.tolist(), images(count)[numbers])
    return folder.finish(folder.shown)


def test_every_image_is_a_file_of_its_class(tmp_path: Path) -> None:
    said = written(tmp_path / "out", ["b", "a"], 2)
    found = sorted((p.relative_to(tmp_path / "out").as_posix(), np.asarray(Image.open(p))[0, 0, 0]) for p in
                   (tmp_path / "out").glob("*/*.png"))  # fmt: skip
    assert found == [("a/000002.png", 2), ("a/000003.png", 3), ("b/000000.png", 0), ("b/000001.png", 1)]
    assert said.startswith("4 images") and "all of them" in said


def test_files_are_there_as_soon_as_they_are_drawn(tmp_path: Path) -> None:
    folder = DrawnFolder(tmp_path / "out")
    folder.check(False)
    folder.describe(["a"], 4)
    folder.begin()
    folder.write([0], images(1))
    assert (tmp_path / "out/a/000000.png").is_file() and not (tmp_path / "out/grid.png").exists()


def test_an_earlier_command_is_replaced_on_request_only(tmp_path: Path) -> None:
    root = tmp_path / "out"
    written(root, ["a", "b"], 4)
    with pytest.raises(InputError, match="images of an earlier command.*--overwrite"):
        written(root, ["a"], 2)
    assert len(list(root.glob("*/*.png"))) == 8
    written(root, ["a"], 2, overwrite=True)
    assert sorted(p.relative_to(root).as_posix() for p in root.glob("*/*.png")) == ["a/000000.png", "a/000001.png"]


def test_what_another_program_wrote_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(InputError, match="holds other files"):
            written(tmp_path, ["a"], 1, overwrite=overwrite)
    with pytest.raises(InputError, match="is a file"):
        written(tmp_path / "notes.txt", ["a"], 1)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_a_list_from_elsewhere_removes_nothing_outside(tmp_path: Path) -> None:
    outside, root = tmp_path / "outside", tmp_path / "out"
    outside.mkdir()
    root.mkdir()
    (root / drawn.LIST).write_text(f'{{"classes": ["../outside", "{outside}", "..", "a"]}}')
    written(root, ["a"], 1, overwrite=True)
    assert outside.is_dir()


def test_the_grid_has_an_end(tmp_path: Path) -> None:
    classes = [f"{k:03d}" for k in range(40)]
    said = written(tmp_path / "out", classes, 20)
    assert "800 images" in said and f"{drawn.GRID_ROWS * drawn.GRID_COLUMNS} of them" in said
    assert max(Image.open(tmp_path / "out/grid.png").size) < 3000
