"""The command: its files, and what it leaves alone."""

import gzip
import json
from pathlib import Path

import pytest
from support.runs import DIGITS, TINY, train

from pixelgen_fast.cli import main


def command(out: Path, *more: str) -> list[str]:
    return ["profile", str(DIGITS), *TINY, "optimizer.warmup_images=0", "--steps", "1", "--out", str(out), *more]


def test_files_of_a_profile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, run = tmp_path / "profile", tmp_path / "run"
    assert main(command(out, f"run.dir={run}")) == 0
    said = capsys.readouterr().out
    assert "patch_blocks.attn" in said and "open trace.json.gz" in said
    assert not run.exists()
    with gzip.open(out / "trace.json.gz") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert {"model.patch_blocks.3.attn", "model.pixel_blocks.0", "loader", "optimizer", "step", "aten::mm"} <= names
    table = json.loads((out / "table.json").read_text())
    assert table["covered_share"] == pytest.approx(1, abs=0.05) and 0 < table["idle_share"] < 1
    blocks = table["parts"]["patch_blocks.mlp"]
    assert {"forward", "backward"} == blocks["seconds"].keys() and blocks["saved_bytes"] > 0
    assert len(table["heaviest"]) == 10 and any(row.get("of_product", 0) > 0 for row in table["heaviest"])
    # two micro-batches of 8 a step: every part of the weights is somewhere
    assert sum(part["weight_bytes"] for part in table["parts"].values()) > 4 * 36 * 96


def test_random_pixels_wait_for_nothing_and_a_run_is_left_as_it_is(tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    assert main(train(run, 32, "optimizer.warmup_images=0")) == 0
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert main(command(out, "--synthetic", f"run.dir={run}", "data.root=/nowhere")) == 0
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    table = json.loads((out / "table.json").read_text())
    assert table["loader_seconds"] < 0.1 * table["profiled_step_seconds"]


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (("--steps", "0"), "--steps is 0"),
        (("train.compile_blocks=true",), "set train.compile_blocks=false"),
        (("optimizer.lr=0",), "optimizer.lr is 0"),
    ],
)
def test_refusals_are_a_line(
    tmp_path: Path, more: tuple[str, ...], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(tmp_path / "out", *more)) == 2
    assert line in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_runs_folder_is_no_place_for_a_profile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "metrics.jsonl").touch()
    assert main(command(tmp_path)) == 2 and "a run's folder" in capsys.readouterr().err
