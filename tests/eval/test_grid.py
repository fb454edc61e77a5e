"""Sample grids, read back from the file."""

import numpy as np
import pytest
import torch
from PIL import Image

from pixelgen_fast.eval.grid import save_grid


def images(count: int, height: int = 4, width: int = 6) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 200, (count, height, width, 3), dtype=np.uint8)


def read(path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_every_image_is_in_its_place_enlarged_by_whole_pixels(tmp_path):
    """Cell (row, column) holds image row * columns + column, each pixel a scale x scale square; white between."""
    x, gap, scale = images(5), 3, 2
    page = read(save_grid(x, tmp_path / "new" / "grid.png", columns=3, gap=gap, scale=scale))
    assert page.shape == (gap + 2 * (4 * scale + gap), gap + 3 * (6 * scale + gap), 3)
    painted = np.zeros(page.shape[:2], dtype=bool)
    for i in range(5):
        top, left = gap + i // 3 * (4 * scale + gap), gap + i % 3 * (6 * scale + gap)
        cell = np.s_[top : top + 4 * scale, left : left + 6 * scale]
        assert np.array_equal(page[cell], np.kron(x[i], np.ones((scale, scale, 1), dtype=np.uint8)))
        painted[cell] = True
    assert (page[~painted] == 255).all()


def test_titles_take_room_outside_the_images(tmp_path):
    """Names appear left of their rows and above their columns; the images themselves are unchanged."""
    x = images(4, 16, 16)
    plain = read(save_grid(x, tmp_path / "plain.png", columns=2))
    named = read(
        save_grid(
            x, tmp_path / "named.png", columns=2, row_titles=["cat", "dog"], column_titles=["a", "b"], title="nimg 5"
        )
    )
    height, width = plain.shape[:2]
    assert np.array_equal(named[-height + 2 :, -width + 2 :][:64, :64], plain[2:66, 2:66])
    left, above = named[-height:, :-width], named[:-height]
    for margin in (left[: height // 2], left[height // 2 :], above[: len(above) // 2], above[len(above) // 2 :]):
        assert (margin < 100).any(), "a title is missing"


@pytest.mark.parametrize(("side", "expected"), [(16, 64), (24, 72), (64, 64), (256, 256)])
def test_small_images_are_enlarged(tmp_path, side, expected):
    page = read(save_grid(torch.from_numpy(images(1, side, side)), tmp_path / "one.png", columns=1, gap=0))
    assert page.shape == (expected, expected, 3)


def test_bad_arguments_are_named(tmp_path):
    path = tmp_path / "grid.png"
    with pytest.raises(ValueError, match=r"uint8 images \[N, H, W, 3\].*float32 \[2, 4, 6, 3\]"):
        save_grid(images(2).astype(np.float32), path, columns=1)
    with pytest.raises(ValueError, match=r"got uint8 \[0, 4, 6, 3\]"):
        save_grid(images(0), path, columns=1)
    with pytest.raises(ValueError, match="2 rows need 2 row titles, got 1"):
        save_grid(images(4), path, columns=2, row_titles=["one"])
    with pytest.raises(ValueError, match="3 columns need 3 column titles, got 2"):
        save_grid(images(4), path, columns=3, column_titles=["a", "b"])
    for name, arguments in {
        "column": {"columns": 0},
        "gap": {"columns": 1, "gap": -1},
        "scale": {"columns": 1, "scale": 0},
    }.items():
        with pytest.raises(ValueError, match=name):
            save_grid(images(2), path, **arguments)
    assert not path.exists()
