"""Exact statistics of latents: against float64 over all images at once, resumed, and refused in another's place."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch
from support.decoding import config_of, write_images
from support.golden import relative

from pixelgen_fast.decoding import statistics
from pixelgen_fast.decoding.statistics import Moments, compute
from pixelgen_fast.errors import InputError
from pixelgen_fast.rae.encoder import load_encoder
from pixelgen_fast.rae.files import read_statistics, statistics_about

COUNT = 13


@pytest.mark.parametrize("sizes", [[13], [5, 5, 3], [1] * 13])
def test_parts_of_any_size_give_the_moments_of_all(sizes: list[int]) -> None:
    """Also where the mean is large beside the deviation, where float32 sums of squares would have no digits left."""
    z = torch.randn(COUNT, 4, 2, 2, generator=torch.Generator().manual_seed(0)) + 1e4
    moments = Moments.none((4, 2, 2), torch.device("cpu"))
    for part in z.split(sizes):
        moments.add(part)
    found = moments.statistics()
    assert moments.count == COUNT
    assert torch.allclose(found.mean, z.double().mean(dim=0), rtol=1e-14)
    assert torch.allclose(found.var, z.double().var(dim=0, unbiased=False), rtol=1e-9)


def latents_of(folder: Path, flip: bool) -> torch.Tensor:
    """All latents, in float64."""
    config = config_of(folder)
    encoder = load_encoder(config.encoder.network, config.encoder.weights, config.grid)
    images = write_images(folder / "data", COUNT)
    views = torch.cat([images, images.flip(2)]) if flip else images
    return encoder(views.permute(0, 3, 1, 2) / 255).double()


@pytest.mark.parametrize("flip", [False, True])
def test_every_image_counts_once_in_every_view(flip: bool, tmp_path: Path) -> None:
    z = latents_of(tmp_path, flip)
    assert "13 images" in compute(config_of(tmp_path, f"data.flip={flip}"))
    path = tmp_path / "run" / "latents.safetensors"
    found = read_statistics(path)
    assert relative(found.mean, z.mean(dim=0)) < 1e-6
    assert relative(found.var, z.var(dim=0, unbiased=False)) < 1e-6
    about = statistics_about(path)
    assert about["count"] == COUNT * (1 + flip) and about["images"] == COUNT and about["unreadable"] == 0
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_stopped_pass_goes_on_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_images(tmp_path / "data", COUNT)
    compute(config_of(tmp_path))
    whole = (tmp_path / "run" / "latents.safetensors").read_bytes()
    add = statistics.Summing.add

    def stopping(self: statistics.Summing, images: torch.Tensor) -> None:
        add(self, images)
        if self.moments.count == 8:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(statistics.Summing, "add", stopping)
    out = tmp_path / "again" / "latents.safetensors"
    assert compute(config_of(tmp_path, f"latents.out={out}")) is None and not out.exists()
    monkeypatch.setattr(statistics.Summing, "add", add)
    assert compute(config_of(tmp_path, f"latents.out={out}")) and out.read_bytes() == whole


def test_what_is_there_is_kept_or_refused(tmp_path: Path) -> None:
    write_images(tmp_path / "data", COUNT)
    compute(config_of(tmp_path))
    assert "is there already" in compute(config_of(tmp_path))
    with pytest.raises(InputError, match="holds other statistics: mirrored False -> True; name another file"):
        compute(config_of(tmp_path, "data.flip=true"))


def test_a_broken_partial_file_is_named(tmp_path: Path) -> None:
    write_images(tmp_path / "data", COUNT)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".latents.safetensors.partial").write_text("half")
    with pytest.raises(InputError, match="partial: cannot be gone on from"):
        compute(config_of(tmp_path))
