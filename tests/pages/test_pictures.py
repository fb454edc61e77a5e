"""The grids on a page: which of them, and how large."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pixelgen_fast.pages import pictures
from pixelgen_fast.runs.folder import RunFolder


def draw(folder: RunFolder, numbers: list[int], size: tuple[int, int] = (8, 6)) -> None:
    for number in numbers:
        path = folder.samples(number)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (number % 256, 0, 0)).save(path)


def test_the_first_the_last_and_an_even_choice_between(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(tmp_path)
    draw(folder, [10, 20, 30, 40, 50, 60])
    Image.new("RGB", (8, 6)).save(folder.final)
    assert [g.nimg for g in pictures.grids(folder, 70)[0]] == [10, 20, 30, 40, 50, 60, 70]
    monkeypatch.setattr(pictures, "MOST_GRIDS", 4)
    found, said = pictures.grids(folder, 70)
    assert [g.nimg for g in found] == [10, 30, 50, 70] and said.startswith("4 of 7 grids")


def test_a_large_grid_is_reduced_and_a_broken_file_left_out(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    draw(folder, [10], (2400, 600))
    draw(folder, [20], (100, 50))
    folder.samples(30).write_bytes(b"half a pict")
    found, said = pictures.grids(folder, 40)
    sizes = [Image.open(io.BytesIO(g.png)).size for g in found]
    assert sizes == [(1200, 300), (100, 50)] and "reduced to 1,200" in said


def test_fewer_of_them_where_they_are_heavy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(tmp_path)
    noise = np.random.default_rng(0).integers(0, 256, (50, 50, 3), dtype=np.uint8)  # 7.5 kB that no PNG makes less
    for number in range(8):
        path = folder.samples(number)
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(noise).save(path)
    monkeypatch.setattr(pictures, "MOST_GRIDS", 8)
    monkeypatch.setattr(pictures, "MOST_BYTES", 40_000)
    found, said = pictures.grids(folder, 8)
    assert [g.nimg for g in found] == [0, 2, 5, 7] and said.startswith("4 of 8 grids")


def test_a_folder_without_grids(tmp_path: Path) -> None:
    assert pictures.grids(RunFolder(tmp_path), 0) == ([], "")
