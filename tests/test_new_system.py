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


@pytest.fixture
def mixer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The system's file in models/, as far as Python can see, and its YAML."""
    folder = tmp_path / "models"
    folder.mkdir()
    (folder / "mixer.py").write_text(MIXER)
    monkeypatch.setattr(models, "__path__", [*models.__path__, str(folder)])
    base = OmegaConf.load(DIGITS)
    base["model"] = {"system": "mixer"}
    changes = [
        "optimizer.schedule=constant", "optimizer.warmup_images=0", "train.global_batch=16", "train.micro_batch=8",
        "sample.steps=2", "sample.grid_every_images=32", "save.every_images=32", "log.tensorboard=false",
    ]  # fmt: skip
    config = tmp_path / "mixer.yaml"
    config.write_text(OmegaConf.to_yaml(OmegaConf.merge(base, OmegaConf.from_dotlist(changes))))
    yield config
    sys.modules.pop("pixelgen_fast.models.mixer", None)
    importlib.invalidate_caches()


def test_a_system_from_one_file_goes_through_every_command(
    mixer: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    whole, broken, out = tmp_path / "whole", tmp_path / "broken", tmp_path / "out"
    assert "mixer" in models.systems()
    assert main(["train", str(mixer), "--dry-run"]) == 0
    assert main(["train", str(mixer), f"run.dir={whole}", "train.images=64"]) == 0
    assert main(["train", str(mixer), f"run.dir={broken}", "train.images=32"]) == 0
    assert main(["train", str(mixer), f"run.dir={broken}", "train.images=64"]) == 0
    assert "image 32 of 64" in capsys.readouterr().out
    expected, found = (read_weights(newest(folder), "raw") for folder in (whole, broken))
    assert expected.keys() == found.keys() and all(torch.equal(expected[k], found[k]) for k in expected)
    assert main(["sample", str(whole), "--per-class", "1", "--classes", "3"]) == 0
    assert main(["evaluate", str(whole), "--samples", "20"]) == 0
    assert main(["export", str(whole), str(out)]) == 0
    labels = torch.arange(3)
    assert torch.equal(draw.load(out).draw(labels), draw.load(whole).draw(labels))
    assert (whole / "samples" / "000000000032.png").is_file() and (whole / "final.png").is_file()
