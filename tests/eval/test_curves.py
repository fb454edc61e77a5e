"""Metrics files and the curves drawn from them."""

import json

import numpy as np
import pytest
from PIL import Image

from pixelgen_fast.eval.curves import read_metrics, running_mean, save_curves, with_measured


def write(path, *lines):
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return path


def test_a_resumed_run_reads_as_one_without_interruptions(tmp_path):
    """Rows past the checkpoint at nimg 200 were written twice; the second writing counts. Another kind of row of the
    same nimg stays."""
    path = write(
        tmp_path / "metrics.jsonl",
        {"nimg": 100, "loss": 1.0},
        {"nimg": 200, "loss": 0.9},
        {"nimg": 200, "share": 0.5},
        {"nimg": 300, "loss": 9.0},
        {"nimg": 400, "loss": 9.0},
        {"nimg": 300, "loss": 0.8},
        {"nimg": 500, "loss": 0.7},
    )
    rows = read_metrics(path)
    assert [(r["nimg"], r.get("loss")) for r in rows] == [(100, 1.0), (200, 0.9), (200, None), (300, 0.8), (500, 0.7)]


def test_half_written_lines_are_left_out_and_named(tmp_path):
    path = write(
        tmp_path / "metrics.jsonl",
        {"nimg": 1, "loss": 1.0},
        '{"nimg": 2, "lo\n',
        {"nimg": 3, "loss": 2.0},
        {"nimg": "x"},
        "{",
    )
    with pytest.warns(UserWarning, match=r"left out 3 unreadable lines, numbers \[2, 4, 5\]"):
        assert [r["nimg"] for r in read_metrics(path)] == [1, 3]
    with pytest.raises(ValueError, match=r"holds no metrics: none of its 1 lines"):
        read_metrics(write(tmp_path / "other.jsonl", {"loss": 1.0}))


@pytest.mark.parametrize(("count", "window"), [(1, 1), (5, 3), (10, 7), (3, 9)])
def test_running_mean(count, window):
    values = np.random.default_rng(0).standard_normal(count)
    expected = [np.mean(values[max(0, i - window // 2) : i + window // 2 + 1]) for i in range(count)]
    np.testing.assert_allclose(running_mean(values, window), expected, rtol=1e-12, atol=1e-12)


def test_curves_are_drawn(tmp_path):
    """Several panels, a skipped step and a row of another kind among the rows: a readable PNG of some size."""
    rows = [{"nimg": i, "loss": 1 / (1 + i), "grad_norm": 1.0} for i in range(200)]
    rows += [{"nimg": 200, "loss": float("nan"), "grad_norm": None}, {"nimg": 201, "share": 0.9}]
    path = save_curves(rows, tmp_path / "plots" / "loss.png", keys=("loss", "grad_norm"), title="digits")
    page = np.asarray(Image.open(path).convert("L"))
    assert page.shape[0] > 500 and page.shape[1] > 500 and page.std() > 5
    assert save_curves(rows[:1], tmp_path / "one.png").stat().st_size > 0


def test_a_key_without_numbers_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no row holds a finite 'los'; the 1 rows hold \['loss'\]"):
        save_curves([{"nimg": 1, "loss": 2.0}], tmp_path / "loss.png", keys=("los",))


def test_what_was_measured_beside_training_joins_its_rows():
    rows = [{"nimg": 16, "loss": 1.0}, {"nimg": 16, "v": 5}, {"nimg": 24, "v": 6}, {"nimg": 32, "loss": 2.0}]
    joined = [{"nimg": 16, "loss": 1.0, "v": 5}, {"nimg": 32, "loss": 2.0, "v": 6}]
    assert with_measured(rows) == joined
    assert with_measured([{"nimg": 3, "psnr": 1.0}]) == [{"nimg": 3, "psnr": 1.0}]
