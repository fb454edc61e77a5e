"""PIXELGEN_OPS forces any body on every command; one that cannot run is refused before anything is made."""

import json
from pathlib import Path

import pytest
import torch
from pixelgen_kernels import bodies

from pixelgen_fast.cli import main

ROOT = Path(__file__).parents[2]
DIGITS = str(ROOT / "configs" / "digits.yaml")
TINY = [
    "model.hidden_size=16",
    "model.num_heads=2",
    "model.patch_depth=1",
    "model.pixel_depth=1",
    "optimizer.warmup_images=0",
    "train.images=2",
    "train.global_batch=2",
    "train.micro_batch=2",
    "log.every_images=2",
    "log.tensorboard=false",
    "sample.steps=1",
    "sample.guidance=1",
    "sample.grid_every_images=0",
    "sample.grid_classes=1",
    "sample.grid_per_class=1",
]
GPU = torch.cuda.is_available()
# without a GPU the kernels run in Triton's interpreter
BODIES = [body for body in bodies.BODIES if not (body == "native" and GPU)]
REFUSED = ("native", "runs on CPU tensors only") if GPU else ("triton", "on a CPU tensor needs TRITON_INTERPRET=1")
# numpy says where a product of the random numbers is cut to its low bits
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of one step by the reference."""
    monkeypatch.setenv(bodies.VARIABLE, "reference")
    assert main(["train", DIGITS, f"run.dir={tmp_path / 'reference'}", *TINY]) == 0
    return tmp_path / "reference"


def first_loss(folder: Path) -> float:
    return json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])["loss"]


@pytest.mark.parametrize("body", BODIES)
def test_every_command_runs(
    body: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """One step gives the loss of the reference, and what is drawn can be judged; a run goes on with another body."""
    monkeypatch.setenv(bodies.VARIABLE, body)
    assert main(["train", DIGITS, "--dry-run", *TINY]) == 0
    own = tmp_path / "own"
    assert main(["train", DIGITS, f"run.dir={own}", *TINY]) == 0
    assert f"operators: {body} (PIXELGEN_OPS={body})" in capsys.readouterr().out
    assert first_loss(own) == pytest.approx(first_loss(run), rel=1e-5)
    assert main(["train", DIGITS, f"run.dir={run}", *TINY, "train.images=4"]) == 0
    assert main(["sample", str(own), "--per-class", "1", "--classes", "3"]) == 0
    assert main(["evaluate", str(own), "--samples", "10"]) == 0
    assert main(["export", str(own), str(tmp_path / "out"), "--dtype", "bf16"]) == 0
    assert main(["sample", str(tmp_path / "out"), "--per-class", "1", "--classes", "3"]) == 0


def test_a_body_that_cannot_run_is_refused_before_anything_is_made(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(bodies, "INTERPRETED", False)
    body, reason = REFUSED
    monkeypatch.setenv(bodies.VARIABLE, body)
    before = sorted(tmp_path.rglob("*"))
    compare = tmp_path / "compare.yaml"
    compare.write_text(
        f"base: {DIGITS}\ndir: {tmp_path / 'compare'}\nteacher: {ROOT}/configs/teacher_digits.yaml\n"
        "variants: {PixelDiT: {}}\n"
    )
    for command in (
        ["train", DIGITS, f"run.dir={tmp_path / 'new'}", *TINY],
        ["sample", str(run)],
        ["evaluate", str(run), "--samples", "10"],
        ["compare", str(compare)],
    ):
        assert main(command) == 2
        assert f"PIXELGEN_OPS={body} {reason}" in capsys.readouterr().err
    compare.unlink()
    assert sorted(tmp_path.rglob("*")) == before
