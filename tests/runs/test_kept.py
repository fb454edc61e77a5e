"""A flow in the latents of an autoencoder from files: trained, resumed, drawn and exported when the files are gone."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from support.autoencoders import write_autoencoder
from support.runs import DIGITS, newest
from torch import Tensor

from pixelgen_fast import interop, models
from pixelgen_fast.cli import main
from pixelgen_fast.models.latent import open_autoencoder
from pixelgen_fast.rae import names
from pixelgen_fast.rae.autoencoder import load_autoencoder
from pixelgen_fast.rae.decoder import Decoder, DecoderSettings
from pixelgen_fast.runs import draw
from pixelgen_fast.runs.checkpoint import read_weights

SIZE = dict(hidden_size=24, num_heads=2, depth=1, head_width=32, head_heads=2, head_depth=1, patch_size=4)


@pytest.fixture
def parts(tmp_path: Path) -> dict[str, str]:
    """The settings that name an autoencoder's files."""
    written = write_autoencoder(tmp_path / "parts")
    names = {"encoder": "encoder", "weights": "encoder_weights", "decoder": "decoder", "statistics": "statistics"}
    return {ours: written[theirs] for theirs, ours in names.items()}


def config(path: Path, parts: dict[str, str]) -> Path:
    base = OmegaConf.load(DIGITS)
    base["model"] = {"system": "ditdh", "latent_channels": 48, **SIZE, **parts}
    changes = [
        "optimizer.schedule=constant", "optimizer.warmup_images=0", "train.global_batch=16", "train.micro_batch=8",
        "sample.steps=2", "sample.solver=euler", "sample.grid_every_images=0", "save.every_images=32",
        "log.tensorboard=false",
    ]  # fmt: skip
    path.write_text(OmegaConf.to_yaml(OmegaConf.merge(base, OmegaConf.from_dotlist(changes))))
    return path


def test_a_run_keeps_its_autoencoder(
    tmp_path: Path, parts: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    file = config(tmp_path / "config.yaml", parts)
    whole, broken, out, again = (tmp_path / name for name in ("whole", "broken", "out", "again"))
    assert main(["train", str(file), "--dry-run"]) == 0
    assert main(["train", str(file), f"run.dir={whole}", "train.images=48"]) == 0
    assert main(["train", str(file), f"run.dir={broken}", "train.images=32"]) == 0
    shutil.rmtree(tmp_path / "parts")
    assert main(["train", str(file), f"run.dir={broken}", "train.images=48"]) == 0, capsys.readouterr().err
    expected, found = (read_weights(newest(folder), "raw") for folder in (whole, broken))
    assert expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in expected)

    labels = torch.arange(3)
    drawn = draw.load(whole).draw(labels)
    assert drawn.float().std() > 0
    assert main(["export", str(whole), str(out)]) == 0
    shutil.rmtree(whole)
    monkeypatch.chdir(tmp_path)
    assert main(["export", "out", str(again)]) == 0
    shutil.rmtree(out)
    assert torch.equal(draw.load(again).draw(labels), drawn)
    assert main(["sample", str(again), "--per-class", "1", "--classes", "3"]) == 0
    assert draw.load(again, alone=True).config.model.encoder is None


def test_latents_are_those_of_the_files(parts: dict[str, str]) -> None:
    settings = models.model_schema("ditdh")(**SIZE, latent_channels=48, **parts)
    model = models.system_module("ditdh").build(settings, 16, 3)
    rae = load_autoencoder(
        parts["encoder"], parts["encoder_weights"], grid=4, decoder=parts["decoder"], statistics=parts["statistics"]
    )
    images = torch.randint(0, 256, (2, 16, 16, 3), dtype=torch.uint8)
    x = model.encode(images)
    assert torch.equal(x, rae.encode(images)) and torch.equal(model.decode(x), rae.decode(x))
    assert not x.requires_grad and not model.decode(x).requires_grad
    assert not any("decoder" in name or "mean" in name for name in model.state_dict())


def test_published_weights_draw_with_a_published_autoencoder(tmp_path: Path, parts: dict[str, str]) -> None:
    """A published decoder does not say how its pixels are scaled; the encoder does, and the copy keeps it."""
    decoder = Decoder(DecoderSettings(hidden_size=768, depth=1, num_heads=12, ffn=8, patch_size=4), 48, 4)
    parts["decoder"] = str(tmp_path / "parts" / "model.pt")
    torch.save(names.decoder_to_public(decoder.state_dict(), grid=4), parts["decoder"])
    settings = models.model_schema("ditdh")(**SIZE | {"patch_size": 16}, latent_channels=48)
    model = models.system_module("ditdh").build(settings, 64, 3)
    torch.save(interop.to_public("ditdh", model.state_dict(), settings, 64), tmp_path / "stage2_model.pt")
    overrides = [f"model.{key}={value}" for key, value in parts.items()]
    command = ["import", str(tmp_path / "stage2_model.pt"), str(tmp_path / "out"), "--system", "ditdh"]
    assert main([*command, *overrides, "model.patch_size=4", "data.image_size=16"]) == 0
    expected = open_autoencoder(models.model_schema("ditdh")(**SIZE, latent_channels=48, **parts), 16)
    shutil.rmtree(tmp_path / "parts")
    generator = draw.load(tmp_path / "out")
    x = torch.randn(1, 48, 4, 4)
    assert torch.equal(generator.model.decode(x), expected.decode(x)) and expected.decoder.std[0] != 1
    sampling = generator.config.sample
    assert (sampling.steps, sampling.solver, sampling.end) == (49, "euler", 0.999)
    images: Tensor = generator.draw(torch.tensor([0, 2]), steps=2)
    assert images.shape == (2, 16, 16, 3) and images.float().std() > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("model.decoder=null", "model.decoder is null, and a run draws what it has learned"),
        ("model.encoder=null", "model.encoder_weights is .*, and model.encoder is null"),
        (
            "model.latent_channels=40",
            "model.latent_channels is 40, and .* gives 48; set model.latent_channels=48",
        ),
        ("model.statistics=nowhere", "nowhere: no such file of latent statistics"),
        ("data.image_size=8", "decoder"),
    ],
)
def test_what_does_not_fit_is_refused_before_a_run(
    change: str, message: str, tmp_path: Path, parts: dict[str, str], capsys: pytest.CaptureFixture
) -> None:
    file = config(tmp_path / "config.yaml", parts)
    assert main(["train", str(file), f"run.dir={tmp_path / 'run'}", change]) == 2
    said = capsys.readouterr().err
    assert re.search(message, said), said
    assert not (tmp_path / "run").exists()
