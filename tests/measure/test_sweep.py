"""`pixelgen evaluate --sweep`: every combination once, stopped and gone on with, on several ranks."""

import json
from pathlib import Path

import pytest
from PIL import Image
from support.ranks import start_ranks
from support.runs import train

from pixelgen_fast.cli import main
from pixelgen_fast.measure import sweep
from pixelgen_fast.measure.parts import Parts
from pixelgen_fast.measure.picture import across

SWEEP = ["--sweep", "steps=1,2", "weights=ema_0.5,raw"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert main(train(folder, 32, "optimizer.warmup_images=0", "model.patch_depth=1", "optimizer.ema=[0.5]")) == 0
    return folder


@pytest.fixture(scope="module")
def swept(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("swept") / "sweep.json"
    assert main(["evaluate", str(run), "--samples", "20", *SWEEP, "--out", str(out)]) == 0
    return out


def figures(file: Path) -> list[tuple]:
    """(point, figures) of each point of a file."""
    return [(entry["point"], entry["figures"]) for entry in json.loads(file.read_text())["points"]]


def test_each_point_is_what_evaluate_finds_there(run: Path, swept: Path, tmp_path: Path) -> None:
    found = figures(swept)
    wanted = [{"steps": n, "weights": w} for w in ("ema_0.5", "raw") for n in (1, 2)]
    assert [point for point, _ in found] == wanted
    for point, values in found[1:3]:
        options = ["--steps", str(point["steps"]), "--weights", point["weights"]]
        assert main(["evaluate", str(run), "--samples", "20", *options, "--out", str(tmp_path / "e.json")]) == 0
        report = json.loads((tmp_path / "e.json").read_text())["report"]
        assert values == {"Fréchet distance": report["frechet_generated"], "right class": report["share"]}
    assert len({str(values) for _, values in found}) == 4, "the points must differ, or nothing is tested"
    with Image.open(swept.with_suffix(".png")) as picture:
        assert picture.size[0] > 500 and len(picture.convert("L").getcolors()) > 10


def test_a_stopped_sweep_goes_on_and_a_longer_one_takes_its_points_over(
    run: Path, swept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    out, write, drawn = tmp_path / "sweep.json", Parts.write, []

    def counted(self: Parts, batch: int, *rest: object) -> None:
        if len(drawn) == stop_after:
            raise OSError("no room")
        drawn.append(batch)
        write(self, batch, *rest)

    monkeypatch.setattr(Parts, "write", counted)
    command = ["evaluate", str(run), "--samples", "20", "--batch", "10", "--out", str(out)]
    stop_after = 3
    assert main([*command, *SWEEP]) != 0
    assert len(figures(out)) == 1
    stop_after = None
    assert main([*command, *SWEEP]) == 0
    assert len(drawn) == 8 and figures(out) == figures(swept)  # two batches a point, each drawn once
    assert main([*command, "--sweep", "steps=2,3", "weights=raw"]) == 0
    assert len(drawn) == 10 and figures(out)[0] == figures(swept)[3]
    assert main([*command, *SWEEP]) == 0
    assert len(drawn) == 10 and figures(out) == figures(swept)
    assert "lowest Fréchet distance" in capsys.readouterr().out


def test_two_ranks_sweep_as_one_does(run: Path, swept: Path, tmp_path: Path) -> None:
    out = tmp_path / "sweep.json"
    command = ["evaluate", str(run), "--samples", "20", "--batch", "6", *SWEEP, "--out", str(out)]
    ranks = start_ranks(command, 2)
    said = [process.communicate(timeout=150)[0] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], said
    assert "4 of 4" in said[0] and "of 4" not in said[1].replace("of 4 batches", "")
    for (point, found), (same, wanted) in zip(figures(out), figures(swept), strict=True):
        assert point == same and found == pytest.approx(wanted, rel=1e-3)


def test_values_are_read() -> None:
    axes = sweep.parse(["interval=none,0.1:0.9", "steps=5,10", "weights=ema,raw", "solver=heun"])
    assert axes["interval"] == [None, (0.1, 0.9)] and axes["steps"] == [5, 10]
    points = sweep.points(axes)
    assert len(points) == 8 and [*points[0]] == [*axes]
    assert [point["weights"] for point in points] == ["ema"] * 4 + ["raw"] * 4
    assert sweep.label(points[4]) == "interval none, steps 5, weights raw, solver heun"
    assert across(axes) == "steps" and across({"weights": ["a", "b"]}) == "weights"


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        ([], "--sweep names nothing"),
        (["guidance"], "write KEY=A,B"),
        (["colour=1"], "where KEY is one of weights, guidance"),
        (["guidance=1,x"], "'x' is no value of guidance, which is a number"),
        (["interval=0.9:0.1"], "interval is (0.9, 0.1); the first must be below the second"),
        (["steps=0"], "steps is 0; it must be above 0"),
        (["solver=rk4"], "'rk4' is no value of solver, which is euler or heun or adams2"),
        (["guidance=1,1.0"], "a value comes twice"),
        (["steps=1", "steps=2"], "steps is swept already"),
        (["weights=,raw"], "a value of weights is empty"),
    ],
)
def test_what_cannot_be_meant_is_refused(run: Path, texts: list[str], said: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["evaluate", str(run), "--sweep", *texts]) == 2
    assert said in capsys.readouterr().err


def test_a_fixed_setting_is_not_swept_too(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["evaluate", str(run), "--guidance", "2", "--sweep", "guidance=1,2"]) == 2
    assert "--guidance is given and swept as well" in capsys.readouterr().err
    (tmp_path / "sweep.json").write_text("[]")
    assert main(["evaluate", str(run), *SWEEP, "--out", str(tmp_path / "sweep.json")]) == 2
    assert "is not what an earlier sweep wrote" in capsys.readouterr().err


def test_weights_that_are_not_there_are_named_before_anything_is_drawn(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "sweep.json"
    assert main(["evaluate", str(run), "--samples", "20", "--sweep", "weights=raw,none", "--out", str(out)]) == 2
    assert "has no weights 'none'" in capsys.readouterr().err and not out.exists()
