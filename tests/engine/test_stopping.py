"""Signals outside the training step: at the start, while a grid is drawn, while images are sampled."""

import json
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.ranks import start_ranks
from support.runs import newest
from support.runs import train as small_run

from pixelgen_fast import commands
from pixelgen_fast.cli import main
from pixelgen_fast.engine import report
from pixelgen_fast.errors import LOST
from pixelgen_fast.runs.checkpoint import read_state
from pixelgen_fast.runs.drawn import DrawnFolder
from pixelgen_fast.signals import REQUEUE

GRIDS = ("sample.grid_every_images=32", "sample.grid_classes=1", "sample.grid_per_class=1", "save.every_images=3200")
LIMIT_SECONDS = 120
FOREVER = "sample.steps=100000"
SHORT = ("optimizer.warmup_images=0", "model.patch_depth=1")


def train(folder: Path, images: int, *overrides: str) -> list[str]:
    return small_run(folder, images, *SHORT, *overrides)


def wait_for_row(folder: Path, nimg: int, process: subprocess.Popen) -> None:
    metrics, end = folder / "metrics.jsonl", time.monotonic() + LIMIT_SECONDS
    while not metrics.exists() or f'"nimg": {nimg},' not in metrics.read_text():
        assert process.poll() is None and time.monotonic() < end, process.communicate()[0]
        time.sleep(0.02)


@pytest.mark.parametrize("world", [1, 2])
def test_a_grid_that_a_signal_ended_is_drawn_on_resuming(tmp_path: Path, world: int) -> None:
    """The signal goes to the last rank, which does not draw: all of them stop, and what is there is saved."""
    ranks = start_ranks(train(tmp_path, 64, *GRIDS, FOREVER), world)
    try:
        wait_for_row(tmp_path, 32, ranks[0])
        ranks[-1].send_signal(signal.SIGTERM)
        said = [process.communicate(timeout=LIMIT_SECONDS)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [REQUEUE] * world, said
    assert "stopped by a signal at image 32, saved" in said[0]
    grid = tmp_path / "samples" / "000000000032.png"
    assert read_state(newest(tmp_path))["nimg"] == 32 and not grid.exists()
    assert main(train(tmp_path, 64, *GRIDS)) == 0
    assert Image.open(grid).size[0] > 64


def test_a_signal_during_the_last_grid_is_a_stop_of_a_finished_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(report.models, "build_model", lambda *_: signal.raise_signal(signal.SIGTERM))
        patched.setattr(report.Report, "_draw", lambda *a: (report.models.build_model(), a[-1]()))
        assert main(train(tmp_path, 32)) == REQUEUE
    assert main(train(tmp_path, 32)) == 0 and (tmp_path / "final.png").is_file()


def test_a_signal_at_the_start_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(commands.cfg, "load", lambda *_: signal.raise_signal(signal.SIGUSR1))
    assert main(train(tmp_path, 32)) == REQUEUE
    assert capsys.readouterr().err == "pixelgen: stopped by SIGUSR1 before work had begun\n"


def test_what_was_sampled_before_a_signal_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert main(train(tmp_path / "run", 16)) == 0
    write = DrawnFolder.write

    def interrupted(folder: DrawnFolder, numbers: list[int], images: np.ndarray) -> None:
        write(folder, numbers, images)
        if len(folder.shown) == 4:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(DrawnFolder, "write", interrupted)
    out = tmp_path / "out"
    arguments = ["--classes", "3", "--per-class", "6", "--batch", "2", "--out", str(out)]
    capsys.readouterr()
    assert main(["sample", str(tmp_path / "run"), *arguments]) == REQUEUE
    assert capsys.readouterr().err.endswith("pixelgen: stopped by SIGTERM; what was done so far is kept\n")
    assert sorted(p.name for p in out.iterdir()) == ["3", "drawn.json"]
    assert [Image.open(p).size for p in out.glob("3/*.png")] == [(16, 16)] * 4


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ImportError("no font library")])
def test_a_picture_that_cannot_be_written_is_written_later(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    save_grid, refused = report.save_grid, []

    def no_room_at_first(images: np.ndarray, path: Path, **layout: object) -> None:
        if not refused:
            refused.append(path)
            raise error
        save_grid(images, path, **layout)

    monkeypatch.setattr(report, "save_grid", no_room_at_first)
    assert main(train(tmp_path, 64, *GRIDS)) == 0
    assert "000000000032.png is missing, the run goes on" in capfd.readouterr().out
    assert refused == [tmp_path / "samples" / "000000000032.png"] and refused[0].is_file()
    assert len(json.loads((tmp_path / "classes.json").read_text())) == 10


def test_a_rank_that_is_stopped_ends_the_run_with_its_name(tmp_path: Path) -> None:
    ranks = start_ranks(train(tmp_path, 16_000_000, "run.rank_limit=3"), 2)
    try:
        wait_for_row(tmp_path, 32, ranks[0])
        ranks[1].send_signal(signal.SIGSTOP)
        said = ranks[0].communicate(timeout=LIMIT_SECONDS)[0]
    finally:
        for process in ranks:
            process.kill()
    assert ranks[0].returncode == LOST, said
    assert f"process {ranks[1].pid}) has given no sign of life for" in said and "last in step" in said


def test_a_page_that_cannot_be_written_costs_a_run_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    def fails(*_: object) -> None:
        raise KeyError("a bug of the page")

    monkeypatch.setattr(report, "write_report", fails)
    assert main(train(tmp_path, 16, *GRIDS)) == 0
    said = capfd.readouterr().out
    assert "report.html is missing, the run goes on" in said and "done: 16 images" in said
