"""Small runs of the digits: their commands, and what they leave."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.models import TINY as TINY_MODELS
from support.models import tiny

from pixelgen_fast import config as cfg
from pixelgen_fast.models import model_schema
from pixelgen_fast.runs.checkpoint import checkpoints
from pixelgen_fast.runs.export import export
from pixelgen_fast.runs.folder import RunFolder

DIGITS = Path(__file__).parents[2] / "configs" / "digits.yaml"
TINY = (
    "model.hidden_size=36", "model.num_heads=3", "model.pixel_depth=1", "optimizer.schedule=constant",
    "sample.steps=2", "train.global_batch=16", "train.micro_batch=8", "log.every_images=16", "save.every_images=32",
    "sample.grid_every_images=0", "log.tensorboard=false",
)  # fmt: skip


def train(folder: Path, images: int, *overrides: str) -> list[str]:
    """The arguments that train a tiny model on the digits."""
    return ["train", str(DIGITS), *TINY, f"run.dir={folder}", f"train.images={images}", *overrides]


def exported(folder: Path, **settings: Any) -> Path:
    """An export of a tiny model of the digits whose weights are at no special value. settings: of `export`."""
    model = tiny("pixeldit", num_classes=10)
    values = {"model": {"system": "pixeldit"} | TINY_MODELS["pixeldit"], "data": {"image_size": 16, "num_classes": 10}}
    config = cfg.from_dict(values | {"sample": {"steps": 2}}, model_schema)
    export(folder, model.state_dict(), config, [str(i) for i in range(10)], "ema", 7, **settings)
    return folder


def rows(folder: Path) -> list[dict]:
    """The metrics of a run."""
    return [json.loads(line) for line in RunFolder(folder).metrics.read_text().splitlines()]


def newest(folder: Path) -> Path:
    """The newest checkpoint of a run."""
    return checkpoints(RunFolder(folder).checkpoints)[0]


def fill_disk(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """Nothing is free when shutil.disk_usage is asked for the at-th time."""
    usage, calls = shutil.disk_usage, []

    def full(path: Path) -> object:
        calls.append(path)
        return usage(path)._replace(free=0) if len(calls) == at else usage(path)

    monkeypatch.setattr(shutil, "disk_usage", full)
