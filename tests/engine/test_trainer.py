"""Runs from the command line on the digits: stopping, killing, resuming elsewhere, bad steps, and what a run leaves.

The data, noise, time and labels of a step are functions of its image numbers, so every way of getting to the same image
must end with the same weights: bit for bit on one rank, to rounding where the order of sums changes.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.golden import relative
from support.runs import DIGITS, fill_disk, newest, train
from support.spoiled import Spoiled

from pixelgen_fast import config as cfg
from pixelgen_fast.cli import main
from pixelgen_fast.engine.changes import data_changes, differences, with_defaults
from pixelgen_fast.models import model_schema
from pixelgen_fast.runs import draw
from pixelgen_fast.runs.checkpoint import checkpoints, read_state, read_weights
from pixelgen_fast.runs.owner import OWNER, Owner
from pixelgen_fast.signals import REQUEUE

# An odd hidden size of the feed-forward layer (hidden 36: int(8/3 * 36) = 96) and 13 classes' worth of uneven shards.
OWN = ("model.patch_depth=1", "data.flip=true", "optimizer.warmup_images=32", "optimizer.ema=[0.5,0.9]")


def command(folder: Path, images: int, *overrides: str) -> list[str]:
    return train(folder, images, *OWN, *overrides)


def start(launcher: list[str], folder: Path, images: int, *overrides: str) -> subprocess.Popen:
    env = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    arguments = [*launcher, *command(folder, images, *overrides)]
    return subprocess.Popen(arguments, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


PYTHON = [sys.executable, "-m", "pixelgen_fast"]
TORCHRUN = [
    sys.executable,
    "-m",
    "torch.distributed.run",
    "--standalone",
    "--nproc-per-node",
    "2",
    "-m",
    "pixelgen_fast",
]


def states(folder: Path) -> dict[str, torch.Tensor]:
    """Weights and both averages of a run's newest checkpoint."""
    kinds = ("raw", "ema_0.5", "ema_0.9")
    return {f"{kind} {name}": v for kind in kinds for name, v in read_weights(newest(folder), kind).items()}


def wait_for(condition, process: subprocess.Popen, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, "timed out"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """800 images in one go on one rank."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert main(command(folder, 800)) == 0
    return folder


def test_stop_and_kill_change_nothing(whole_run: Path, tmp_path: Path) -> None:
    """SIGTERM saves and exits with its own code; kill -9 loses only what was not saved; the end is bit-identical."""
    folder = tmp_path / "broken"
    process = start(PYTHON, folder, 800)
    wait_for(lambda: (folder / "metrics.jsonl").exists() and (folder / "metrics.jsonl").read_text(), process)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == REQUEUE, said
    assert "stopped by a signal" in said
    stopped_at = read_state(newest(folder))["nimg"]
    assert 0 < stopped_at < 800

    process = start(PYTHON, folder, 800)
    wait_for(lambda: read_state(newest(folder))["nimg"] > stopped_at, process)
    process.kill()
    process.communicate()
    assert read_state(newest(folder))["nimg"] < 800

    assert main(command(folder, 800)) == 0
    expected, found = states(whole_run), states(folder)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    wanted = [json.loads(line) for line in (whole_run / "metrics.jsonl").read_text().splitlines()]
    assert [row["nimg"] for row in rows] == [row["nimg"] for row in wanted] == list(range(16, 801, 16))
    rates = {"images_per_second", "model_flops", "model_flops_share", "memory_bytes", "loader_wait_share"}
    without = [[{k: v for k, v in row.items() if k not in rates} for row in of_run] for of_run in (rows, wanted)]
    assert without[0] == without[1]  # the cut intervals show in the rates alone


def test_other_world_sizes_and_stages_end_the_same(whole_run: Path, tmp_path: Path) -> None:
    """One rank at stage 1, then two at stage 3, then one at stage 2: weights and averages to 1e-5."""
    folder = tmp_path / "moved"
    assert main(command(folder, 128)) == 0
    process = start(TORCHRUN, folder, 272, "train.zero_stage=3")
    said = process.communicate(timeout=200)[0]
    assert process.returncode == 0, said
    assert "resumed" in said and "image 128 of 272" in said and "train.zero_stage has changed: 1 -> 3" in said
    assert main(command(folder, 800, "train.zero_stage=2")) == 0
    expected, found = states(whole_run), states(folder)
    for name in expected:
        assert relative(found[name], expected[name]) < 1e-5, name


def test_deepspeed_launcher(tmp_path: Path) -> None:
    deepspeed = str(Path(sys.executable).with_name("deepspeed"))
    launcher = [deepspeed, "--num_accelerators", "2", "--master_port", "29471", "--module", "pixelgen_fast"]
    process = start(launcher, tmp_path / "run", 48)
    said = process.communicate(timeout=200)[0]
    assert process.returncode == 0, said
    assert "2 x cpu" in said and read_state(newest(tmp_path / "run"))["world"] == 2


def test_what_a_run_leaves(whole_run: Path) -> None:
    for name in ("final.png", "loss.png"):
        assert Image.open(whole_run / name).size[0] > 100
    rows = [json.loads(line) for line in (whole_run / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["images_per_second"] > 0 and 0 < rows[-1]["model_flops_share"] < 1
    assert {"lr", "grad_norm", "memory_bytes", "loader_wait_share"} <= rows[-1].keys()
    assert [int(p.name) for p in checkpoints(whole_run / "checkpoints")] == [800, 768]
    assert "hidden_size: 36" in (whole_run / "config.yaml").read_text()


def test_a_finished_run_does_no_work_again(whole_run: Path, capsys: pytest.CaptureFixture) -> None:
    before = states(whole_run)
    assert main(command(whole_run, 800)) == 0
    assert "image 800 of 800" in capsys.readouterr().out
    assert all(torch.equal(before[name], value) for name, value in states(whole_run).items())


def test_resume_refuses_what_does_not_fit(whole_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(command(tmp_path / "new", 64, f"run.resume={tmp_path / 'nothing'}")) == 2
    assert "holds no valid checkpoint" in capsys.readouterr().err
    assert main(command(whole_run, 800, "model.patch_depth=2")) == 2
    assert "model.patch_depth (1 -> 2)" in capsys.readouterr().err
    assert main(command(whole_run, 800, "optimizer.ema=[0.5,0.9,0.99]")) == 2
    assert "optimizer.ema ([0.5, 0.9] -> [0.5, 0.9, 0.99])" in capsys.readouterr().err
    assert main(command(whole_run, 800, "optimizer.name=muon")) == 2
    assert "optimizer.name (adamw -> muon)" in capsys.readouterr().err


def test_damaged_checkpoints_are_no_new_beginning(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(command(tmp_path / "run", 48)) == 0
    for path in checkpoints(tmp_path / "run" / "checkpoints"):
        (path / "manifest.json").write_text("{}")
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert main(command(tmp_path / "run", 64)) == 2
    assert "checkpoints in" in capsys.readouterr().err
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize("name", ["checkpoints", "samples", "tensorboard"])
def test_a_file_where_the_run_keeps_a_folder_is_refused(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / name).write_text("mine")
    assert main(command(tmp_path, 48)) == 2
    assert f"{name} is a file" in capsys.readouterr().err
    assert {p.name for p in tmp_path.iterdir()} == {name, OWNER}


def test_a_folder_that_a_run_is_writing_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    owner = Owner(tmp_path / "run")
    owner.take()
    assert main(command(tmp_path / "run", 48)) == 2
    assert f"is in use by process {os.getpid()}" in capsys.readouterr().err
    owner.close()
    assert main(command(tmp_path / "run", 48)) == 0


def test_exported_weights_draw_the_same_images(whole_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    labels = torch.arange(4)
    drawn = draw.load(whole_run).draw(labels)
    assert main(["export", str(whole_run), str(tmp_path / "out")]) == 0
    assert torch.equal(draw.load(tmp_path / "out").draw(labels), drawn)
    raw = draw.load(whole_run, "raw")
    assert not torch.equal(raw.model.head.linear.weight, draw.load(whole_run).model.head.linear.weight)
    assert main(["export", str(whole_run), str(tmp_path / "raw16"), "--weights", "raw", "--dtype", "bf16"]) == 0
    assert draw.load(tmp_path / "raw16").model.head.linear.weight.dtype == torch.bfloat16
    assert main(["export", str(whole_run), str(tmp_path / "out")]) == 2
    assert "not empty" in capsys.readouterr().err
    assert main(command(tmp_path / "tuned", 48, f"run.init={tmp_path / 'out'}")) == 0


def test_samples_do_not_depend_on_the_batch(whole_run: Path) -> None:
    drawer = draw.load(whole_run)
    labels = torch.arange(7)
    together = drawer.draw(labels, batch=7)
    for batch in (1, 3, 4):
        assert torch.equal(drawer.draw(labels, batch=batch), together)
    assert torch.equal(drawer.draw(labels[3:], first=3), together[3:])


def test_sample_and_evaluate_commands(whole_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "drawn"
    assert main(["sample", str(whole_run), "--classes", "3", "7", "--per-class", "2", "--out", str(out)]) == 0
    assert sorted(p.relative_to(out).parts[0] for p in out.glob("*/*.png")) == ["3", "3", "7", "7"]
    assert (out / "grid.png").is_file()
    assert main(["sample", str(whole_run), "--classes", "x"]) == 2
    assert "no such class; there are 0, 1" in capsys.readouterr().err
    assert main(["evaluate", str(whole_run), "--samples", "40", "--out", str(tmp_path / "e.json")]) == 0
    assert "of 40 generated digits show the requested class" in capsys.readouterr().out
    assert json.loads((tmp_path / "e.json").read_text())["report"]["generated"] == 40
    assert main(["evaluate", str(tmp_path / "drawn")]) == 2
    assert "holds no valid checkpoint" in capsys.readouterr().err


def test_steps_that_are_not_finite_are_skipped_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    Spoiled(48, 80).install(monkeypatch)
    assert main(command(tmp_path / "run", 112)) == 0
    said = capfd.readouterr().out
    assert "images 48 to 64 skipped" in said and "(2 in a row)" in said and "images 80" not in said
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line, parse_constant=pytest.fail) for line in lines]  # JSON knows no NaN and no Infinity
    assert [row["skipped_steps"] for row in rows] == [0, 0, 0, 1, 2, 2, 2]
    assert [row["grad_norm"] is None for row in rows] == [False] * 3 + [True] * 2 + [False] * 2
    assert read_state(newest(tmp_path / "run"))["optimizer"]["step"] == 5


def test_a_full_disk_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    """The second checkpoint finds no room; the run goes on, says so, and the third is written."""
    fill_disk(monkeypatch, at=3)
    assert main(command(tmp_path / "run", 96)) == 0
    said = capfd.readouterr().out
    assert "no checkpoint at image 64, it is tried again" in said
    assert [int(p.name) for p in checkpoints(tmp_path / "run" / "checkpoints")] == [96, 32]


def test_ten_bad_steps_in_a_row_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    Spoiled(48, 10_000).install(monkeypatch)
    assert main(command(tmp_path / "run", 400, "save.keep=9")) == 2
    error = capsys.readouterr().err
    assert "10 steps in a row" in error and "image 208" in error
    assert "last good checkpoint is" in error and "what was saved stays" in error


def test_own_images_of_every_kind(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    """configs/folder.yaml on mixed sizes, modes and formats, fewer images than a batch, one of them unreadable."""
    random = np.random.default_rng(0)
    root = tmp_path / "images"
    for i, (mode, name) in enumerate(
        [("RGB", "a.jpg"), ("L", "b.png"), ("CMYK", "c.jpg"), ("P", "d.png"), ("RGBA", "e.png"), ("RGB", "f.webp")]
    ):
        folder = root / ("cats" if i % 2 else "dogs")
        folder.mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 256, (40 + 30 * i, 90 - 7 * i, 3), dtype=np.uint8)
        Image.fromarray(pixels).convert(mode).save(folder / name)
    (root / "cats" / "broken.jpg").write_bytes((root / "dogs" / "a.jpg").read_bytes()[:500])
    small = ["model.hidden_size=36", "model.num_heads=3", "model.patch_depth=1", "model.pixel_depth=1",
             "train.images=32", "train.global_batch=16", "train.micro_batch=8", "optimizer.warmup_images=0",
             "log.every_images=16", "sample.steps=2", "log.tensorboard=false"]  # fmt: skip
    config = str(DIGITS.with_name("folder.yaml"))
    assert main(["train", config, f"data.root={root}", f"run.dir={tmp_path / 'run'}", *small]) == 0
    assert "7 images in 2 classes" in capfd.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["replaced_images"] == 1
    assert json.loads((tmp_path / "run" / "classes.json").read_text()) == ["cats", "dogs"]
    shutil.copy(root / "dogs" / "a.jpg", root / "dogs" / "g.jpg")
    assert main(["train", config, f"data.root={root}", f"run.dir={tmp_path / 'run'}", *small, "train.images=48"]) == 0
    said = capfd.readouterr().out
    assert "the data have changed: 7 images -> 8;" in said
    assert [line.split()[0] for line in said.splitlines() if "has changed:" in line] == ["train.images"]

    assert main(["train", config, f"data.root={tmp_path / 'none'}", f"run.dir={tmp_path / 'run2'}", *small]) == 2
    assert "does not exist" in capfd.readouterr().err
    assert not (tmp_path / "run2" / "checkpoints").exists()
    assert main(["data", "scan", str(root)]) == 0
    assert "broken.jpg" in capfd.readouterr().out
    assert main(["data", "pack", str(root), str(tmp_path / "packed"), "--size", "64", "--upright"]) == 0
    packed = [f"data.root={tmp_path / 'packed'}", f"run.dir={tmp_path / 'run3'}"]
    assert main(["train", config, *packed, *small, "data.class_balanced=true"]) == 0
    # 7 images, half of them of the 3 cats and half of the 4 dogs
    assert "of the smallest class, of 3, comes 1.17 times, of the largest, of 4, 0.875 times" in capfd.readouterr().out


NOW = {"images": 8, "fingerprint": "b", "order": "a rule"}


@pytest.mark.parametrize(
    ("old", "said"),
    [
        (NOW, []),
        (None, []),
        ({**NOW, "images": 7, "fingerprint": "a"}, ["the data have changed: 7 images -> 8"]),
        ({**NOW, "fingerprint": "a"}, ["the data have changed: 8 images as before, with others among them"]),
        ({**NOW, "order": "another"}, ["the order of the images has changed: another -> a rule"]),
        (
            {"images": 8, "fingerprint": "b"},
            ["the order of the images has changed: an earlier version's, which it does not name -> a rule"],
        ),
    ],
)
def test_other_data_and_another_order_are_named(old: dict | None, said: list[str]) -> None:
    assert data_changes(old, NOW) == said


def test_a_setting_that_is_newer_than_a_checkpoint_counts_as_its_default() -> None:
    now = cfg.to_dict(cfg.load(DIGITS, [], model_schema))
    old = {name: dict(section) for name, section in now.items()}
    del old["model"]["registers"], old["objective"]["path"]
    assert with_defaults(old) == now and differences(with_defaults(old), now) == {}
    unknown = old | {"model": {"system": "of another time"}}
    assert with_defaults(unknown) == unknown
