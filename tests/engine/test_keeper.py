"""When a run writes checkpoints, which one it calls good, and how it goes back to that by itself."""

import json
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.engines import Memory
from support.runs import fill_disk, rows, train
from support.spoiled import Spoiled

from pixelgen_fast.cli import main
from pixelgen_fast.engine import keeper, trainer
from pixelgen_fast.runs import saver
from pixelgen_fast.runs.checkpoint import CheckpointError, Content, checkpoints, read_state
from pixelgen_fast.runs.ranks import Ranks


def saved(folder: Path) -> list[int]:
    return sorted(int(path.name) for path in checkpoints(folder / "checkpoints"))


def command(folder: Path, images: int, *overrides: str) -> list[str]:
    own = ("model.patch_depth=1", "optimizer.warmup_images=0", "save.keep=9", "save.every_images=16")
    return train(folder, images, *own, *overrides)


def test_no_checkpoint_is_written_while_the_loss_is_out_of_its_range(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    Spoiled(48, 80, factor=1e6).install(monkeypatch)
    assert main(command(tmp_path / "run", 112)) == 0
    said = capfd.readouterr().out
    assert "images 48 to 64: loss" in said and "is far above" in said and "(2 in a row)" in said
    assert saved(tmp_path / "run") == [16, 32, 48, 96, 112]
    assert "checkpoint of image 48: training waited" in said
    health = read_state(tmp_path / "run" / "checkpoints" / f"{112:012d}")["health"]
    assert health["steps"] == 5 and health["good"] in (48, 96)


@pytest.mark.parametrize("factor", [1e6, float("inf")])
def test_the_checkpoint_that_is_named_good_was_taken_before_the_trouble(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, factor: float
) -> None:
    """The one of image 48 has the weights of which the first bad loss came; the same command then goes on from 32."""
    with monkeypatch.context() as spoiled:
        Spoiled(48, 10_000, factor).install(spoiled)
        assert main(command(tmp_path / "run", 400, "save.keep=1")) == 2
    error = capsys.readouterr().err
    good = tmp_path / "run" / "checkpoints" / f"{32:012d}"
    assert "10 steps in a row" in error and f"the last good checkpoint is {good}." in error
    assert saved(tmp_path / "run")[-1] == 32 and (good.parent / f"suspect-{48:012d}").is_dir()
    assert main(command(tmp_path / "run", 112)) == 0
    assert "resumed" in (said := capsys.readouterr().out) and "image 32 of 112" in said


def test_the_good_checkpoint_may_be_where_the_run_went_on_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert main(command(tmp_path / "first", 48)) == 0
    Spoiled(64, 10_000).install(monkeypatch)
    settings = ("train.max_bad_steps=2", "save.every_images=64", f"run.resume={tmp_path / 'first'}")
    assert main(command(tmp_path / "second", 400, *settings)) == 2
    good = tmp_path / "first" / "checkpoints" / f"{48:012d}"
    assert f"the last good checkpoint is {good}." in capsys.readouterr().err
    assert saved(tmp_path / "second") == []


def test_a_run_that_ends_badly_is_no_success(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    Spoiled(80, 10_000).install(monkeypatch)
    assert main(command(tmp_path / "run", 112)) == 2
    assert "2 steps in a row" in capsys.readouterr().err
    assert saved(tmp_path / "run") == [16, 32, 48, 64]


def test_a_run_goes_back_by_itself_as_often_as_it_may(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    settings = ("optimizer.lr=1e-3", "train.max_bad_steps=3", "train.returns=1", "train.return_lr=0.25")
    with monkeypatch.context() as spoiled:
        Spoiled(80, 10_000, times=6).install(spoiled)  # three steps of two micro-batches
        assert main(command(tmp_path / "run", 160, *settings)) == 0
    said = capfd.readouterr().out
    assert f"returned to {tmp_path / 'run' / 'checkpoints' / f'{64:012d}'}, return 1 of 1" in said
    found = rows(tmp_path / "run")
    assert [row["nimg"] for row in found] == list(range(16, 161, 16))
    assert [row["returns"] for row in found] == [0] * 4 + [1] * 6
    assert [row["lr"] for row in found] == [1e-3] * 4 + [2.5e-4] * 6
    assert read_state(tmp_path / "run" / "checkpoints" / f"{160:012d}")["returns"] == 1
    Spoiled(160, 10_000).install(monkeypatch)
    assert main(command(tmp_path / "run", 400, *settings)) == 2
    assert "3 steps in a row" in capfd.readouterr().err


def test_what_could_not_be_written_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    """The disk is full at image 64 only; the checkpoint comes a few steps later, not 64 images later."""
    fill_disk(monkeypatch, at=2)
    monkeypatch.setattr(keeper, "RETRY_SECONDS", 0.0)
    assert main(command(tmp_path / "run", 128, "save.every_images=64", "save.background=false")) == 0
    said = capfd.readouterr().out
    assert "no checkpoint at image 64, it is tried again" in said
    assert saved(tmp_path / "run") == [80, 128]
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])["nimg"] == 128


@pytest.mark.parametrize("background", ["true", "false"])
def test_the_last_checkpoint_is_tried_again_before_the_run_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture, background: str
) -> None:
    """Its folder is deleted while it is written."""
    write, lost = saver.write, []

    def into_nothing(content: Content, team: Ranks) -> None:
        if content.nimg == 48 and len(lost) < 2:
            lost.append(content.nimg)
            raise CheckpointError("checkpoint failed: its folder is gone")
        write(content, team)

    monkeypatch.setattr(saver, "write", into_nothing)
    assert main(command(tmp_path / "run", 48, f"save.background={background}")) == 0
    assert capfd.readouterr().out.count("no checkpoint at image 48, it is tried again: ") == 2
    assert saved(tmp_path / "run") == [16, 32, 48]


def test_a_slow_disk_costs_no_checkpoint_that_is_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The one of image 32 is still being written when that of 48 is taken, and must outlive it though keep is 1."""
    write = saver.write

    def slowly(content: Content, team: Ranks) -> None:
        time.sleep(1.0 if content.nimg == 32 else 0.0)
        write(content, team)

    monkeypatch.setattr(saver, "write", slowly)
    Spoiled(48, 10_000).install(monkeypatch)
    assert main(command(tmp_path / "run", 400, "save.keep=1")) == 2
    assert f"the last good checkpoint is {tmp_path}/run/checkpoints/{32:012d}." in capsys.readouterr().err


@pytest.mark.parametrize(("free", "enough"), [(None, True), (10**12, True), (1000, False)])
def test_checkpoints_that_memory_cannot_hold_are_written_at_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, free: int | None, enough: bool
) -> None:
    monkeypatch.setattr(keeper, "available_memory", lambda: free)
    assert keeper.has_memory(Memory(1)) == enough
    assert ("save.background needs" in caplog.text) == (not enough)


def test_a_run_whose_checkpoints_were_all_set_aside_does_not_begin_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run = tmp_path / "run"
    assert main(command(run, 32)) == 0
    for path in checkpoints(run / "checkpoints"):
        path.rename(path.with_name(f"suspect-{path.name}"))
    metrics = (run / "metrics.jsonl").read_bytes()
    assert main(command(run, 64)) == 2
    assert f"is known to be good: {run}/checkpoints/suspect-{32:012d} was set aside" in capsys.readouterr().err
    assert (run / "metrics.jsonl").read_bytes() == metrics


@pytest.mark.parametrize(("room", "code"), [(0.5, 2), (1.5, 0)])
def test_checkpoints_that_are_there_are_not_asked_to_fit_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, room: float, code: int
) -> None:
    """Two are kept and there; room for the one that is written next is enough."""
    run = tmp_path / "run"
    assert main(command(run, 48, "save.keep=2")) == 0
    size = sum(file.stat().st_size for file in checkpoints(run / "checkpoints")[0].glob("*.safetensors"))
    usage = shutil.disk_usage(run)._replace(free=int(room * size))
    monkeypatch.setattr(trainer, "shutil", SimpleNamespace(disk_usage=lambda path: usage))
    assert main(command(run, 64, "save.keep=2")) == code
    assert ("and one being written need" in capsys.readouterr().err) == (code == 2)
