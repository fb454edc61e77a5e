"""A decoder's training from the command line: what it leaves, how it goes on elsewhere, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.decoding import CONFIG, config_of, overrides, write_images
from support.golden import relative
from support.ranks import start_ranks
from support.runs import newest, rows

from pixelgen_fast.cli import main
from pixelgen_fast.config import ConfigError, to_dict
from pixelgen_fast.decoding.train import DecoderTrainer
from pixelgen_fast.engine.changes import differences, with_defaults
from pixelgen_fast.rae.autoencoder import load_autoencoder
from pixelgen_fast.runs.checkpoint import read_weights
from pixelgen_fast.runs.shards import read_weights as read_raw

OWN = (
    "train.images=64", "log.every_images=16", "save.every_images=32", "objective.discriminator_from=16",
    "objective.gan_from=32", "sample.grid_every_images=32", "sample.grid_images=4", "optimizer.warmup_images=16",
    "optimizer.ema=[0.5,0.9]", "data.flip=true",
)  # fmt: skip


def command(folder: Path, *changes: str) -> list[str]:
    return ["decoder", str(CONFIG), *overrides(folder), *OWN, *changes]


def states(run: Path) -> dict[str, torch.Tensor]:
    """All weights, averages and buffers of a run's newest checkpoint."""
    kinds = ("raw", "ema_0.5", "ema_0.9")
    return {f"{kind} {name}": v for kind in kinds for name, v in read_weights(newest(run), kind).items()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 64 images in one go."""
    folder = tmp_path_factory.mktemp("whole")
    write_images(folder / "data", 24)
    assert main(command(folder)) == 0
    return folder


def test_what_a_run_leaves(whole: Path) -> None:
    run = whole / "run"
    found = rows(run)
    assert [row["nimg"] for row in found] == [16, 32, 48, 64]
    assert found[0]["loss_discriminator"] == 0 < found[1]["loss_discriminator"]
    assert found[1]["gan_scale"] == 0 < found[2]["gan_scale"] and 0 < found[3]["discriminator_accuracy"] < 1
    assert found[3]["loss"] == found[3]["loss_l1"]
    for name in ("samples/000000000032.png", "final.png", "loss.png"):
        assert np.asarray(Image.open(run / name)).std() > 10
    about = json.loads((run / "decoder" / "config.json").read_text())
    assert about["nimg"] == 64 and about["weights"] == "ema_0.5"

    rae = load_autoencoder(None, decoder=str(run / "decoder"))
    assert rae.encoder is not None and rae.latent_shape == (48, 4, 4)
    state = {f"raw decoder.{name}": value for name, value in rae.decoder.state_dict().items()}
    averaged = read_raw(newest(run), "ema_0.5")
    assert all(torch.equal(value, averaged[name.removeprefix("raw ")]) for name, value in state.items())


def test_a_setting_that_is_newer_than_a_checkpoint_counts_as_its_default(tmp_path: Path) -> None:
    now = to_dict(config_of(tmp_path))
    old = {name: dict(section) for name, section in now.items()}
    del old["data"]["validation"], old["optimizer"]["clip"]
    assert differences(with_defaults(old, DecoderTrainer.read_config), now) == {}


def test_a_resumed_run_ends_bit_for_bit_the_same(whole: Path, tmp_path: Path) -> None:
    """Also without the files that its encoder came from: the run has kept a copy."""
    shutil.copytree(whole / "data", tmp_path / "data")
    shutil.copytree(whole / "encoder", tmp_path / "encoder")
    shutil.copytree(whole / "run", tmp_path / "run")
    shutil.rmtree(newest(tmp_path / "run"))
    discriminator = shutil.move(tmp_path / "encoder", tmp_path / "moved")
    again = ["decoder", str(CONFIG), *overrides(whole), *OWN, f"run.dir={tmp_path / 'run'}"]
    again += [f"encoder.weights={tmp_path / 'gone'}", f"discriminator.weights={discriminator}"]
    assert main(again) == 0
    expected, found = states(whole / "run"), states(tmp_path / "run")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    wanted = [row["loss"] for row in rows(whole / "run")]
    assert [row["loss"] for row in rows(tmp_path / "run")] == wanted


def test_two_ranks_end_as_one(whole: Path, tmp_path: Path) -> None:
    """Begun by one rank and gone on with by two, at other micro-batches; weights, averages and norms to 1e-5."""
    run = tmp_path / "run"
    shutil.copytree(whole / "run", run)
    shutil.rmtree(newest(run))
    arguments = [*command(whole), f"run.dir={run}", "train.micro_batch=2"]
    ranks = start_ranks(arguments, world=2)
    said = [process.communicate(timeout=200)[0] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], "\n".join(said)
    assert "image 32 of 64" in said[0] and "2 ranks x 2 x 2" in said[0]
    expected, found = states(whole / "run"), states(run)
    for name in expected:
        assert relative(found[name], expected[name]) < 1e-5, name


def test_a_run_begins_from_a_decoder(whole: Path, tmp_path: Path) -> None:
    begun = [*command(whole), f"run.dir={tmp_path / 'run'}", f"run.init={whole / 'run' / 'decoder'}"]
    assert main([*begun, "train.images=8", "optimizer.warmup_images=0", "optimizer.lr=1e-12"]) == 0
    before, after = (load_autoencoder(None, decoder=str(f / "run" / "decoder")).decoder for f in (whole, tmp_path))
    assert all(torch.allclose(p, q, atol=1e-9) for p, q in zip(before.parameters(), after.parameters(), strict=True))


def test_changes_that_a_checkpoint_cannot_follow(whole: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(command(whole, "decoder.ffn=32", "train.images=128")) == 2
    assert "was trained with other settings: decoder.ffn (24 -> 32)" in capsys.readouterr().err
    other = [*command(whole), f"run.dir={whole / 'other'}", f"run.init={whole / 'run' / 'decoder'}"]
    assert main([*other, "decoder.depth=2"]) == 2
    assert "holds a decoder of" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("decoder.patch_size=3", "data.image_size 16 is not a multiple of decoder.patch_size 3"),
        ("decoder.num_heads=3", "decoder.hidden_size 16 must be a multiple of decoder.num_heads 3"),
        ("data.resize=8", "data.resize 8 is smaller than data.image_size 16"),
        ("objective.discriminator_from=100", "objective.gan_from .* comes before objective.discriminator_from 100"),
        ("optimizer.ema=[1.5]", r"optimizer.ema is \[1.5\]"),
        ("train.micro_batch=3", "train.micro_batch 3 does not divide train.global_batch 8"),
        ("optimizer.warmup_images=32000", "optimizer.warmup_images 32000 is not below train.images 32000"),
        ("objective.latent_noise=-1", "objective.latent_noise is -1.0; it must not be negative"),
    ],
)
def test_refusals_name_the_key_and_the_fix(change: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        config_of(tmp_path, "objective.gan_from=50", change)
