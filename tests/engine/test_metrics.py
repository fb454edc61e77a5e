"""Loggers: their ids, and that they never cost a run."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.runs import train

from pixelgen_fast import config as cfg
from pixelgen_fast.cli import main
from pixelgen_fast.engine.metrics import Metrics
from pixelgen_fast.models import model_schema
from pixelgen_fast.runs.folder import RunFolder

ROW = {"nimg": 16, "loss": 1.0, "images_per_second": 1.0}


class Service:
    """A Weights & Biases that fails to log now and then."""

    def __init__(self) -> None:
        self.ids: list[str] = []
        self.rows: list[int] = []
        self.down = False

    def init(self, **settings: Any) -> SimpleNamespace:
        assert settings["resume"] == "allow"
        self.ids.append(settings["id"])
        return SimpleNamespace(log=self.log, finish=self.finish)

    def log(self, row: dict[str, Any]) -> None:
        self.finish()
        self.rows.append(row["nimg"])

    def finish(self) -> None:
        if self.down:
            raise ConnectionError("no answer")


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Service:
    made = Service()
    monkeypatch.setitem(sys.modules, "wandb", made)
    return made


def metrics(root: Path) -> Metrics:
    _, file, *overrides = train(root, 64, "optimizer.warmup_images=0", "log.wandb_project=pixels")
    root.mkdir(parents=True, exist_ok=True)
    return Metrics(RunFolder(root), 0, 0, 64, cfg.load(file, overrides, model_schema))


def test_folders_of_one_name_are_two_runs_and_a_resumed_run_is_one(tmp_path: Path, service: Service) -> None:
    for folder in ("a/run", "b/run", "a/run"):
        metrics(tmp_path / folder).close()
    assert service.ids[0] == service.ids[2] != service.ids[1]


def test_a_service_that_fails_costs_its_rows_only(
    tmp_path: Path, service: Service, capfd: pytest.CaptureFixture
) -> None:
    written = metrics(tmp_path)
    for nimg, down in ((16, False), (32, True), (48, True), (64, False), (80, True)):
        service.down = down
        written.write({**ROW, "nimg": nimg})
    written.close()
    assert service.rows == [16, 64] and len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 5
    said = capfd.readouterr().out
    assert [f"has no row of image {nimg}" in said for nimg in (32, 48, 80)] == [True, False, True]


def test_a_resumed_run_writes_tensorboard_where_it_did(tmp_path: Path) -> None:
    """Its files lie in the run's folder, and rows after the checkpoint are taken back."""
    options = ("optimizer.warmup_images=0", "model.patch_depth=1", "log.tensorboard=true")
    for images in (32, 48):
        assert main(train(tmp_path, images, *options)) == 0
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = loader.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [16, 32, 48]


WHOLE = b'{"nimg": 16, "loss": 1.0}\n{"nimg": 32, "loss": 1.0}\n'


@pytest.mark.parametrize(
    "behind",
    [b"", b'{"nimg": 48, "loss": 1.0}\n', b'{"nimg": 8, "lo', b'{"nimg": 8, "lo\0\0', b"\xff\xfe\n", b"[]\n", b"7\n",
     b'{"nimg": null}\n', b'{"nimg": [1]}\n', b'{"loss": 1.0}\n', b"\n\n"],
)  # fmt: skip
def test_rows_behind_the_checkpoint_and_broken_ones_are_dropped(tmp_path: Path, behind: bytes) -> None:
    folder = RunFolder(tmp_path)
    folder.metrics.write_bytes(WHOLE + behind)
    Metrics(folder, 0, 32, 64, cfg.Config()).close()
    assert folder.metrics.read_bytes() == WHOLE


@pytest.mark.parametrize(
    ("there", "left"),
    [
        (b'{"nimg": 16}\n{"nimg": 32}\n{"nimg": 48}\n', b'{"nimg": 16}\n{"nimg": 32}\n'),
        (b'{"nimg": 16}\n{"nimg": 3', b'{"nimg": 16}\n'),
        (b'{"nimg": 16}\n{"nimg": 32}', b'{"nimg": 16}\n{"nimg": 32}\n'),
        (b'{"nimg": 16}\nnot a row\n{"nimg": 32}\n', b'{"nimg": 16}\n{"nimg": 32}\n'),
    ],
)
def test_rows_after_the_checkpoint_are_dropped(tmp_path: Path, there: bytes, left: bytes) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(there)
    Metrics(RunFolder(tmp_path), 0, 32, 64).close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == left


def test_a_full_disk_keeps_no_run_from_going_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(path: Path) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "metrics.jsonl").write_bytes(b'{"nimg": 16}\n{"nimg": 32}\n')
    monkeypatch.setattr("pixelgen_fast.engine.metrics.replaced", no_room)
    Metrics(RunFolder(tmp_path), 0, 16, 64).close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == b'{"nimg": 16}\n'
