"""PSNR by hand, and a decoder judged from the command line: digits whole, other images by a stand-in of FID."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from support.decoding import CONFIG, overrides, write_images
from torch import Tensor

from pixelgen_fast.cli import main
from pixelgen_fast.decoding import judge
from pixelgen_fast.decoding.judge import decoder_folder, psnr
from pixelgen_fast.diffusion.solver import to_uint8
from pixelgen_fast.rae.autoencoder import load_autoencoder


def test_psnr_is_the_mean_of_each_images() -> None:
    a = torch.randint(0, 256, (300, 4, 4, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    b = a.roll(1, dims=0)
    errors = [np.mean((x.double() - y.double()).numpy() ** 2) for x, y in zip(a, b, strict=True)]
    assert psnr(a, b) == pytest.approx(np.mean([10 * np.log10(255**2 / e) for e in errors]))
    assert psnr(a, a) == pytest.approx(10 * np.log10(255**2 * 48))


def trained(folder: Path, *changes: str) -> Path:
    arguments = ["decoder", str(CONFIG), *overrides(folder), "train.images=8", "optimizer.warmup_images=0", *changes]
    assert main([*arguments, "objective.gan_weight=0"]) == 0
    return folder / "run"


def test_digits_are_judged_as_generated_ones_are(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = trained(tmp_path, "data.root=digits")
    assert main(["evaluate", str(run), "--samples", "64", "--batch", "48"]) == 0
    said = capsys.readouterr().out
    assert "64 images, encoded and decoded: PSNR" in said and "LPIPS" not in said
    found = json.loads((run / "evaluation.json").read_text())
    assert found["settings"]["root"] == "digits" and found["report"]["lpips"] is None
    assert 0 < found["report"]["psnr"] < 20 and found["report"]["distribution"]["generated"] == 64


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on twelve images of no meaning."""
    folder = tmp_path_factory.mktemp("images")
    write_images(folder / "data", 12)
    return trained(folder)


def test_other_images_are_judged_by_fid(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What FID gets are the images and what becomes of them, in one order."""
    images = write_images(tmp_path / "data", 12)
    seen: list[Tensor] = []

    class Figures:
        def as_dict(self) -> dict:
            return {"fid": 1.0}

        def lines(self) -> list[str]:
            return ["FID 1"]

    def fid(decoded: Tensor, reference: Tensor, **options: object) -> Figures:
        seen.extend((decoded, reference))
        return Figures()

    monkeypatch.setattr(judge, "evaluate_fid", fid)
    monkeypatch.setattr(judge, "check_reference", lambda *args, **options: None)
    monkeypatch.setattr(judge, "FeatureNetworks", lambda **options: None)
    assert main(["evaluate", str(run / "decoder"), "--out", str(tmp_path / "found.json")]) == 0
    decoded, originals = seen
    rae = load_autoencoder(None, decoder=str(run / "decoder"))
    assert sorted(map(bytes, originals.numpy())) == sorted(map(bytes, images.numpy()))
    assert torch.equal(decoded, to_uint8(rae.decode(rae.encode(originals))))
    found = json.loads((tmp_path / "found.json").read_text())["report"]
    assert found["psnr"] == pytest.approx(psnr(decoded, originals)) and found["distribution"] == {"fid": 1.0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "3"], "--steps is of drawing"),
        (["--samples", "13"], "--samples is 13, and .* has 12 images"),
        (["--vgg", "/none.pth"], "--vgg /none.pth: no such file"),
    ],
)
def test_options_that_do_not_fit(
    options: list[str], message: str, run: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judge, "check_reference", lambda *args, **options: None)
    monkeypatch.setattr(judge, "FeatureNetworks", lambda **options: None)
    assert main(["evaluate", str(run), *options]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert decoder_folder(run) == run / "decoder" and decoder_folder(run.parent) is None
