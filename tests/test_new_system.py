"""A new system is one file and one YAML: it trains, resumes, samples, is judged and exported by the same commands."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from support.runs import DIGITS, newest

from pixelgen_fast import models
from pixelgen_fast.cli import main
from pixelgen_fast.runs import draw
from pixelgen_fast.runs.checkpoint import read_weights

MIXER = '''
"""A mixer of patches: the smallest system there is, for a test."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pixelgen_fast.layers import patchify, unpatchify
from pixelgen_fast.models import system
from pixelgen_fast.models.system import System


@dataclass
class Settings(system.Settings):
    system: str = "mixer"
    hidden_size: int = 32
    num_heads: int = 1
    patch_size: int = 4


class Mixer(System):
    def __init__(self, settings: Settings, image_size: int, num_classes: int) -> None:
        super().__init__(settings, image_size, num_classes, tap_depth=1)
        D, F = settings.hidden_size, 3 * self.patch_size**2
        self.enter, self.classes = nn.Linear(F + 1, D), nn.Embedding(num_classes + 1, D)
        self.mix, self.leave = nn.Linear(self.grid**2, self.grid**2), nn.Linear(D, F)

    def forward(self, z: Tensor, t: Tensor, y: Tensor, tap: int | None = None):
        self.check_images(z)
        self.check_tap(tap)
        patches = patchify(z, self.patch_size).flatten(2)
        time = t[:, None, None].expand(*patches.shape[:2], 1).to(patches.dtype)
        h = self.enter(torch.cat([patches, time], dim=-1)) + self.classes(y)[:, None]
        h = h + self.mix(torch.tanh(h).mT).mT
        prediction = unpatchify(self.leave(torch.tanh(h)), self.grid, self.patch_size)
        return prediction if tap is None else (prediction, h)

    def blocks(self) -> list[nn.Module]:
        return [self.mix]

    def whole_modules(self) -> list[nn.Module]:
        return []


def build(settings: Settings, image_size: int, num_classes: int) -> Mixer:
    return Mixer(settings, image_size, num_classes)
'''


# its only piece is the whole image, and it knows the mean of each class
MEANS = '''
"""The mean image of each class: the smallest sequential system, for a test."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from pixelgen_kernels import philox
from torch import Tensor, nn

from pixelgen_fast.config import Objective, Sampling
from pixelgen_fast.diffusion.path import to_unit
from pixelgen_fast.models import system
from pixelgen_fast.models.system import SequentialSystem


@dataclass
class Settings(system.Settings):
    system: str = "means"
    hidden_size: int = 3
    patch_size: int = 4


class Means(SequentialSystem):
    loss_weights = {"squares": 1.0, "sum": 0.5}

    used_objective = frozenset({"class_drop", "time_shift"})

    def __init__(self, settings: Settings, image_size: int, num_classes: int) -> None:
        super().__init__(settings, image_size, num_classes)
        self.y_embed = nn.Embedding(num_classes + 1, 3 * image_size**2)

    def forward(
        self, images: Tensor, y: Tensor, numbers: Tensor, seed: int, objective: Objective
    ) -> dict[str, Tensor]:
        error = to_unit(images).flatten(1) - self.y_embed(y)
        error = error + 0.01 * philox.normal(seed, numbers, philox.NOISE, error.shape[1])
        return {"squares": error.square().mean(1), "sum": error.sum(1).square()}

    def draw(
        self, labels: Tensor, numbers: Tensor, settings: Sampling, objective: Objective, before_pass: Callable
    ) -> Tensor:
        before_pass()
        x = self.y_embed(labels)
        x = x + 0.1 * philox.normal(settings.seed, numbers, philox.SAMPLING, x.shape[1])
        return x.view(-1, 3, self.image_size, self.image_size)

    def blocks(self) -> list[nn.Module]:
        return []

    def whole_modules(self) -> list[nn.Module]:
        return []


def build(settings: Settings, image_size: int, num_classes: int) -> Means:
    return Means(settings, image_size, num_classes)
'''


@pytest.fixture(params=["mixer", "means"])
def system(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The YAML of a system whose file is in models/, as far as Python can see."""
    folder, name = tmp_path / "models", request.param
    folder.mkdir()
    (folder / f"{name}.py").write_text({"mixer": MIXER, "means": MEANS}[name])
    monkeypatch.setattr(models, "__path__", [*models.__path__, str(folder)])
    base = OmegaConf.load(DIGITS)
    base["model"] = {"system": name}
    changes = [
        "optimizer.schedule=constant", "optimizer.warmup_images=0", "train.global_batch=16", "train.micro_batch=8",
        "sample.steps=2", "sample.grid_every_images=32", "save.every_images=32", "log.tensorboard=false",
    ]  # fmt: skip
    config = tmp_path / f"{name}.yaml"
    config.write_text(OmegaConf.to_yaml(OmegaConf.merge(base, OmegaConf.from_dotlist(changes))))
    yield config
    sys.modules.pop(f"pixelgen_fast.models.{name}", None)
    importlib.invalidate_caches()


def test_a_system_from_one_file_goes_through_every_command(
    system: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    whole, broken, out = tmp_path / "whole", tmp_path / "broken", tmp_path / "out"
    assert system.stem in models.systems()
    assert main(["train", str(system), "--dry-run"]) == 0
    assert main(["train", str(system), f"run.dir={whole}", "train.images=64"]) == 0
    assert main(["train", str(system), f"run.dir={broken}", "train.images=32"]) == 0
    assert main(["train", str(system), f"run.dir={broken}", "train.images=64"]) == 0
    assert "image 32 of 64" in capsys.readouterr().out
    expected, found = (read_weights(newest(folder), "raw") for folder in (whole, broken))
    assert expected.keys() == found.keys() and all(torch.equal(expected[k], found[k]) for k in expected)
    assert main(["sample", str(whole), "--per-class", "1", "--classes", "3"]) == 0
    assert main(["evaluate", str(whole), "--samples", "20"]) == 0
    assert main(["export", str(whole), str(out)]) == 0
    labels = torch.arange(3)
    assert torch.equal(draw.load(out).draw(labels), draw.load(whole).draw(labels))
    assert (whole / "samples" / "000000000032.png").is_file() and (whole / "final.png").is_file()


@pytest.mark.parametrize("system", ["means"], indirect=True)
@pytest.mark.parametrize(
    ("change", "said"),
    [("path=energy_guided", "path is energy_guided"), ("frequency_weight=1", "frequency_weight is 1.0")],
)
def test_a_sequential_system_refuses_what_it_does_not_use(
    system: Path, tmp_path: Path, capsys: pytest.CaptureFixture, change: str, said: str
) -> None:
    assert main(["train", str(system), f"run.dir={tmp_path / 'run'}", f"objective.{change}"]) == 2
    printed = capsys.readouterr().err
    assert f"objective.{said}; means has no use for it, leave it at" in printed
    assert not (tmp_path / "run").exists()
