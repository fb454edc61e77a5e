"""Latents of mean 0 and variance 1, files of ours and the published ones, and parts that do not belong together."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.autoencoders import write_autoencoder
from support.golden import relative
from support.teachers import write_teacher

from pixelgen_fast.cli import main
from pixelgen_fast.errors import InputError
from pixelgen_fast.rae import names
from pixelgen_fast.rae.autoencoder import Autoencoder, load_autoencoder
from pixelgen_fast.rae.decoder import Decoder, DecoderSettings
from pixelgen_fast.rae.encoder import load_encoder
from pixelgen_fast.rae.files import Statistics, load_decoder, read_statistics, save_decoder, write_statistics

V3 = "vit_small_patch16_dinov3"
C = 48  # the teacher's width


def images(count: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_encode_standardises_and_decode_turns_it_back(tmp_path: Path) -> None:
    kwargs = write_autoencoder(tmp_path)
    rae = load_autoencoder(**kwargs)
    assert rae.latent_shape == (C, 4, 4) and not any(p.requires_grad for p in rae.parameters())
    raw = images(64)
    z = rae.encoder(raw.permute(0, 3, 1, 2) / 255)
    statistics = read_statistics(kwargs["statistics"])
    x = rae.encode(raw)
    expected = (z.double() - statistics.mean) / (statistics.var.double() + 1e-5).sqrt()
    assert x.dtype == torch.float32 and relative(x, expected) < 1e-6
    assert relative(rae.decode(x), 2 * rae.decoder(z) - 1) < 1e-4
    plain = load_autoencoder(**kwargs | {"statistics": None})
    assert relative(plain.encode(raw), z) < 1e-6


def test_it_stays_float32_where_it_matters_when_it_is_cast(tmp_path: Path) -> None:
    rae = load_autoencoder(**write_autoencoder(tmp_path))
    wanted = rae.encode(images(2))
    rae.bfloat16()
    found = rae.encode(images(2))
    assert found.dtype == torch.float32 and rae.decode(found).dtype == torch.float32
    assert rae.mean.dtype == rae.encoder.mean.dtype == rae.decoder.positions.dtype == torch.float32
    assert relative(found, wanted) < 0.05


def test_on_the_meta_device_shapes_alone(tmp_path: Path) -> None:
    kwargs = write_autoencoder(tmp_path)
    with torch.device("meta"):
        rae = load_autoencoder(**kwargs)
    assert rae.latent_shape == (C, 4, 4) and rae.decoder.embed.weight.is_meta
    assert rae.decode(torch.zeros(2, C, 4, 4, device="meta")).shape == (2, 3, 16, 16)


def test_published_files(tmp_path: Path) -> None:
    """A decoder's state dict alone and inside a training checkpoint; statistics of torch."""
    settings = DecoderSettings(hidden_size=768, depth=1, num_heads=12, ffn=8, patch_size=4)
    decoder = Decoder(settings, C, 4)
    public = names.decoder_to_public(decoder.state_dict(), grid=4)
    torch.save(public, tmp_path / "model.pt")
    inside = {f"decoder.{name}": value for name, value in public.items()} | {"encoder.x": torch.ones(1)}
    torch.save({"step": 3, "model": {}, "ema": inside}, tmp_path / "training.pt")
    mean, var = torch.randn(C, 4, 4), torch.rand(C, 4, 4) + 0.5
    torch.save({"mean": mean, "var": var}, tmp_path / "stat.pt")
    z = torch.randn(1, C, 4, 4)
    for name in ("model.pt", "training.pt"):
        read = load_decoder(tmp_path / name)
        assert torch.equal(read(z), decoder(z))
    found = read_statistics(tmp_path / "stat.pt")
    assert torch.equal(found.mean, mean) and torch.equal(found.var, var)


def test_pixels_of_a_published_decoder_have_the_channels_of_its_encoder(tmp_path: Path) -> None:
    decoder = Decoder(DecoderSettings(hidden_size=768, depth=1, num_heads=12, ffn=8, patch_size=4), C, 4)
    torch.save(names.decoder_to_public(decoder.state_dict(), grid=4), tmp_path / "model.pt")
    kwargs = dict(
        encoder=V3, weights=str(write_teacher(tmp_path / "t", V3)), grid=4, decoder=str(tmp_path / "model.pt")
    )
    assert load_autoencoder(**kwargs).decoder.mean.flatten().tolist() == pytest.approx([0.4] * 3)
    assert load_autoencoder(**kwargs, layers=(0, 1)).decoder.std.flatten().tolist() == [1.0] * 3


def test_a_published_decoder_becomes_a_folder_with_its_encoder(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    decoder = Decoder(DecoderSettings(hidden_size=768, depth=1, num_heads=12, ffn=8, patch_size=4), C, 4)
    torch.save(names.decoder_to_public(decoder.state_dict(), grid=4), tmp_path / "model.pt")
    weights, out = str(write_teacher(tmp_path / "t", V3)), tmp_path / "out"
    options = ["--system", "rae_decoder", "--encoder", V3, "--encoder-weights", weights]
    assert main(["import", str(tmp_path / "model.pt"), str(out), *options]) == 0
    assert "decoder of [48, 4, 4] latents" in capsys.readouterr().out
    found, wanted = load_autoencoder(None, decoder=str(out)), load_autoencoder(V3, weights, grid=4)
    raw = images(2)
    assert torch.equal(found.encode(raw), wanted.encode(raw))
    z = torch.randn(1, C, 4, 4)
    assert torch.allclose(found.decode(z), 2 * (decoder(z) * 0.3 + 0.4) - 1, atol=1e-6)
    for wrong, message in (([], "exists and is not empty"), (["--image-size", "16"], "no part of a rae_decoder")):
        assert main(["import", str(tmp_path / "model.pt"), str(out), *options, *wrong]) == 2
        assert message in capsys.readouterr().err


def test_a_decoder_is_exported_under_its_published_names(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    decoder = Decoder(DecoderSettings(hidden_size=768, depth=1, num_heads=12, ffn=8, patch_size=4), C, 4)
    save_decoder(tmp_path / "decoder", decoder, {})
    assert main(["export", str(tmp_path / "decoder"), str(tmp_path / "out")]) == 0
    found = load_file(tmp_path / "out" / "model.safetensors")
    wanted = names.decoder_to_public(decoder.state_dict(), grid=4)
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], value) for name, value in wanted.items())
    z = torch.randn(1, C, 4, 4)
    assert torch.equal(load_decoder(tmp_path / "out" / "model.safetensors")(z), decoder(z))
    assert main(["export", str(tmp_path / "decoder"), str(tmp_path / "out")]) == 2
    assert "exists and is not empty" in capsys.readouterr().err


def test_parts_that_do_not_belong_together(tmp_path: Path) -> None:
    kwargs = write_autoencoder(tmp_path)
    with pytest.raises(InputError, match=r"encoder gives latents \[48, 2, 2\] and the decoder takes \[48, 4, 4\]"):
        load_autoencoder(**kwargs | {"grid": 2})
    with pytest.raises(InputError, match=r"statistics are of latents \[48, 4, 4\] and these are \[48, 2, 2\]"):
        load_autoencoder(**kwargs | {"grid": 2, "decoder": None})
    other = str(write_teacher(tmp_path / "other", V3, seed=1))
    with pytest.raises(InputError, match="are of another encoder than this one"):
        load_autoencoder(**kwargs | {"weights": other})
    only = load_autoencoder(**kwargs | {"decoder": None})
    with pytest.raises(InputError, match="has no decoder"):
        only.decode(torch.zeros(1, C, 4, 4))
    without = load_autoencoder(**kwargs | {"encoder": None})
    with pytest.raises(InputError, match="has no encoder"):
        without.encode(images(1))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"running": torch.ones(1)}, "holds running instead of mean and var"),
        ({"mean": torch.ones(2, 2, 2), "var": torch.ones(2, 2, 3)}, "are no statistics"),
        ({"mean": torch.ones(2, 2, 2), "var": -torch.ones(2, 2, 2)}, "are no statistics"),
    ],
)
def test_files_that_hold_no_statistics(content: dict, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "stat.pt")
    with pytest.raises(InputError, match=message):
        read_statistics(tmp_path / "stat.pt")


def test_files_that_are_not_there_or_no_decoder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file of latent statistics"):
        read_statistics(tmp_path / "none")
    with pytest.raises(InputError, match="no such file or folder of a decoder"):
        load_decoder(tmp_path / "none")
    with pytest.raises(InputError, match="holds no readable config.json of a decoder"):
        load_decoder(tmp_path)


def test_statistics_are_written_whole_and_know_what_they_are_of(tmp_path: Path) -> None:
    encoder = load_encoder(V3, str(write_teacher(tmp_path / "t", V3)), 4)
    statistics = Statistics(torch.randn(C, 4, 4), torch.rand(C, 4, 4))
    write_statistics(tmp_path / "s.safetensors", statistics, {"encoder": encoder.fingerprint()})
    found = read_statistics(tmp_path / "s.safetensors", encoder)
    assert np.array_equal(found.mean, statistics.mean) and np.array_equal(found.var, statistics.var)
    assert Autoencoder(encoder, None, found).latent_shape == (C, 4, 4)
