"""DiT-DH and RAEv2's generator: their published counts, how they start, and the autoencoder that stays outside. The
reference numbers of tests/golden hold their maths."""

import pytest
import rebuilt
import torch
from support.golden import FOLDER
from support.models import batch, tiny_of
from torch import Tensor, nn

from pixelgen_fast.engine.metrics import forward_flops
from pixelgen_fast.engine.parallel import wrap_blocks
from pixelgen_fast.models import ditdh, latent, raev2

SIZES = {
    "S": (dict(hidden_size=384, depth=12, num_heads=6), 196_455_764, 196_357_204),
    "B": (dict(hidden_size=768, depth=12, num_heads=12), 294_295_892, 294_099_028),
    "L": (dict(hidden_size=1024, depth=24, num_heads=16), 621_744_436, 621_482_036),
    "XL": (dict(), 838_675_796, 838_380_628),
}
tiny = tiny_of("ditdh")
latents = (48, 4, 4)


@pytest.mark.parametrize("size", SIZES)
def test_parameter_counts(size: str) -> None:
    """The published count has the position table and the time's frequencies with it, which are not trained."""
    settings, everything, trained = SIZES[size]
    with torch.device("meta"):
        model = ditdh.build(ditdh.Settings(**settings), 256, 1000)
    count = sum(p.numel() for p in model.parameters())
    assert count == trained
    assert count + model.position.numel() + model.t_embed.frequencies.numel() == everything


@pytest.mark.parametrize(("size", "gflops"), [("S", 96.9), ("B", 131.4), ("L", 247.1), ("XL", 323.2)])
def test_published_flops(size: str, gflops: float) -> None:
    """2 per multiply-add, of an image of 256 pixels."""
    with torch.device("meta"):
        model = ditdh.build(ditdh.Settings(**SIZES[size][0]), 256, 1000)
    assert forward_flops(model) / 1e9 == pytest.approx(gflops, abs=0.05)


def test_on_the_meta_device_no_file_is_read() -> None:
    with torch.device("meta"):
        model = tiny(randomise=False, latent_channels=40, encoder="vit_base", decoder="nowhere")
        x = model.encode(torch.zeros(2, 16, 16, 3, dtype=torch.uint8))
    assert x.shape == (2, 40, 4, 4) and model.decode(x).shape == (2, 3, 16, 16) and x.is_meta


def test_parameter_count_of_raev2() -> None:
    with torch.device("meta"):
        model = raev2.build(raev2.Settings(), 256, 1000)
    assert sum(p.numel() for p in model.parameters()) + model.t_embed.frequencies.numel() == 875_216_500


@pytest.mark.parametrize("system", ["ditdh", "raev2"])
def test_first_output_is_zero_and_frequencies_are_a_standard_normal_draw(system: str) -> None:
    model = tiny_of(system)(randomise=False)
    z, t, y = batch(shape=latents)
    assert torch.equal(model(z, t, y), torch.zeros_like(z))
    frequencies = model.t_embed.frequencies
    assert frequencies.shape == (256,) and abs(float(frequencies.mean())) < 0.3 and 0.8 < float(frequencies.std()) < 1.2
    assert "t_embed.frequencies" in model.state_dict() and "t_embed.frequencies" not in dict(model.named_parameters())


@pytest.mark.parametrize("recompute", ["operators", "blocks"])
@pytest.mark.parametrize("system", ["ditdh", "raev2"])
def test_recomputation_changes_no_name_and_no_gradient(system: str, recompute: str) -> None:
    plain, wrapped = (tiny_of(system)() for _ in range(2))
    wrap_blocks(wrapped.blocks(), recompute=recompute, compile_blocks=False)
    assert list(plain.state_dict()) == list(wrapped.state_dict())
    for model in (plain, wrapped):
        model(*batch(shape=latents)).square().mean().backward()
    for (name, p), q in zip(plain.named_parameters(), wrapped.parameters(), strict=True):
        assert p.grad is q.grad is None or torch.equal(p.grad, q.grad), name


@pytest.mark.parametrize("file", ["rae_ditdh", "raev2_ditdh"])
def test_the_kernels_of_a_gpu_meet_the_reference_numbers(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a hidden width, 170 here and 5461 in the published head, is rounded up in the products."""
    monkeypatch.setenv("PIXELGEN_OPS", "triton")
    errors = rebuilt.errors(FOLDER / f"{file}.npz")
    assert errors and max(errors.values()) <= rebuilt.LIMIT, errors


def test_frequencies_keep_their_digits_when_the_model_is_cast() -> None:
    model = tiny()
    before = model.t_embed.frequencies.clone()
    assert torch.equal(model.bfloat16().t_embed.frequencies, before)
    z, t, y = batch(torch.bfloat16, latents)
    assert model(z, t.float(), y).dtype == torch.bfloat16


def test_the_class_reaches_the_head_through_the_encoder_alone() -> None:
    """With the encoder's gates at zero, a class changes nothing, and the time still does."""
    model = tiny()
    for block in model.encoder_blocks:
        nn.init.zeros_(block.modulation.weight)
        nn.init.zeros_(block.modulation.bias)
    z, t, y = batch(shape=latents)
    assert torch.equal(model(z, t, y), model(z, t, (y + 1) % 4))
    assert not torch.allclose(model(z, t, y), model(z, t / 2, y))


def test_the_last_tokens_of_raev2_stand_nowhere() -> None:
    model = tiny_of("raev2")()
    assert torch.equal(model.rope_cos[16:], torch.ones(5, 6)) and torch.equal(model.rope_sin[16:], torch.zeros(5, 6))


def test_equally_wide_encoder_and_head_need_no_layer_between_them() -> None:
    model = tiny(head_width=24)
    assert isinstance(model.head.condition, nn.Identity)
    z, t, y = batch(shape=latents)
    assert model(z, t, y).shape == z.shape


class Halves(nn.Module):
    """An autoencoder with weights, which would train."""

    latent_shape = latents

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(0.5))

    def encode(self, images: Tensor) -> Tensor:
        return latent.PatchPixels(16, 4).encode(images) * self.factor

    def decode(self, x: Tensor) -> Tensor:
        return latent.PatchPixels(16, 4).decode(x) / self.factor


def test_the_autoencoder_is_no_part_of_the_model_yet_follows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latent, "open_autoencoder", lambda settings, image_size: Halves())
    model = tiny()
    inside = model.autoencoder
    assert not any(inside is module for module in model.modules()) and "factor" not in str(list(model.state_dict()))
    x = model.encode(torch.zeros(1, 16, 16, 3, dtype=torch.uint8))
    assert not x.requires_grad and torch.equal(x, torch.full((1, *latents), -0.5))
    assert torch.equal(model.decode(x), torch.full((1, 3, 16, 16), -1.0))
    model.bfloat16()
    assert inside.factor.dtype == torch.bfloat16 and model.decode(x).dtype == torch.float32
    assert model.to("meta").autoencoder.factor.is_meta


def test_a_latent_is_the_pixels_of_its_patch() -> None:
    images = torch.randint(0, 256, (2, 16, 16, 3), dtype=torch.uint8)
    x = tiny().encode(images)
    row, column, channel = 2, 1, 2
    patch = images[:, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4, channel].flatten(1)
    assert torch.equal(x[:, 16 * channel : 16 * channel + 16, row, column], patch.float() / 127.5 - 1)


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.latent_channels is 40, and model\.encoder patches gives 48"):
        tiny(latent_channels=40)
    with pytest.raises(ValueError, match=r"model\.encoder 'vae' is not a model of timm"):
        tiny(encoder="vae")
    with pytest.raises(ValueError, match=r"model\.encoder is null"):
        tiny(encoder=None).encode(torch.zeros(1, 16, 16, 3, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"model\.base_depth 4 is not one of the blocks 1 to 3"):
        tiny_of("raev2")(base_depth=4)
    with pytest.raises(ValueError, match=r"DiTDH was built for latents \[B, 48, 4, 4\], got \[B, 3, 16, 16\]"):
        tiny()(*batch())
