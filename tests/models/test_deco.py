"""DeCo: published sizes and costs, its start, its decoder in float64, that it learns, and its wrapping."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from support.finite_differences import check_gradient
from support.models import batch, tiny_of

from pixelgen_fast.config import Objective
from pixelgen_fast.diffusion.loss import flow_loss
from pixelgen_fast.diffusion.path import add_noise
from pixelgen_fast.engine.alignment import FeatureAlignment, make_projector
from pixelgen_fast.engine.metrics import forward_flops
from pixelgen_fast.engine.objective import FlowMatching
from pixelgen_fast.engine.parallel import wrap_blocks
from pixelgen_fast.layers import SwiGLU
from pixelgen_fast.models import deco

L = dict(hidden_size=1024, num_heads=16, patch_depth=22)
XL = dict(hidden_size=1152, num_heads=16, patch_depth=28)
tiny = tiny_of("deco")


@pytest.mark.parametrize(("size", "parameters"), [(L, 426_938_019), (XL, 682_282_851)])
def test_published_parameter_counts(size: dict, parameters: int) -> None:
    with torch.device("meta"):
        model = deco.build(deco.Settings(**size), 256, 1000)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == parameters


@pytest.mark.parametrize("body", ["reference", "triton"])
@pytest.mark.parametrize(("size", "gflops"), [(L, 155.03), (XL, 244.94)])
def test_published_flops_but_for_the_places(
    size: dict, gflops: float, body: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The public code embeds the 64 cosines of a pixel's place in each of the 256 patches, this one in one patch."""
    monkeypatch.setenv("PIXELGEN_OPS", body)
    monkeypatch.setattr(SwiGLU, "MULTIPLE", 1)  # columns of zeros are no work of the model
    with torch.device("meta"):
        model = deco.build(deco.Settings(**size), 256, 1000)
    saved = 255 * 256 * 2 * 64 * 32
    assert (forward_flops(model) + saved) / 1e9 == pytest.approx(gflops, abs=0.005)


def test_first_output_is_zero_and_the_patch_blocks_act() -> None:
    model = tiny(randomise=False)
    z, t, y = batch()
    prediction, tokens = model(z, t, y, tap=2)
    assert torch.equal(prediction, torch.zeros_like(z))
    assert not torch.allclose(tokens, model.patch_embed(z)[0], rtol=1e-2)


def test_the_decoder_in_numpy() -> None:
    """Pixel by pixel in float64, from the formulas: cosines of the place, condition, modulated MLPs, head."""
    model = tiny().double()
    pixels, s = torch.randn(2, 16, 16, 3, dtype=torch.float64), torch.randn(2, 16, 24, dtype=torch.float64)
    found = model.decode_pixels(pixels, s).detach().view(2, 16, 16, 3).numpy()
    w = {name: value.numpy() for name, value in model.state_dict().items()}

    def linear(name: str, x: np.ndarray) -> np.ndarray:
        return w[f"{name}.weight"] @ x + w[f"{name}.bias"]

    def silu(x: np.ndarray) -> np.ndarray:
        return x / (1 + np.exp(-x))

    def norm(x: np.ndarray) -> np.ndarray:
        return (x - x.mean()) / np.sqrt(x.var() + 1e-6)

    f = np.arange(8) * 8 / 7
    for b, patch, pixel in [(0, 0, 0), (0, 3, 7), (1, 9, 8), (1, 15, 15)]:
        row, column = np.divmod(pixel, 4)
        cosines = np.outer(np.cos(np.pi * f * column / 3), np.cos(np.pi * f * row / 3)) / (1 + np.outer(f, f))
        x = linear("pixel_embed", np.concatenate([pixels[b, patch, pixel].numpy(), cosines.reshape(-1)]))
        x = linear("pixel_proj", x)
        y = silu(linear("condition", s[b, patch].numpy()).reshape(16, 8)[pixel])
        for i in range(2):
            block = f"decoder_blocks.{i}"
            shift, scale, gate = linear(f"{block}.modulation", y).reshape(3, 8)
            h = norm(x) * w[f"{block}.norm.weight"] + w[f"{block}.norm.bias"]
            x = x + gate * linear(f"{block}.fc2", silu(linear(f"{block}.fc1", h * (1 + scale) + shift)))
        # the tables are float32
        np.testing.assert_allclose(found[b, patch, pixel], linear("head.1", norm(x)), rtol=0, atol=1e-5)


def test_images_of_a_batch_do_not_mix() -> None:
    model = tiny().double()
    z, t, y = batch(torch.float64)
    alone = torch.cat([model(z[i : i + 1], t[i : i + 1], y[i : i + 1]) for i in range(2)])
    assert torch.allclose(model(z, t, y), alone, rtol=0, atol=1e-12)


def test_gradient_is_that_of_finite_differences() -> None:
    """In float64, along a random direction in all parameters at once."""
    model = tiny().double()
    z, t, y = batch(torch.float64)
    w = torch.randn_like(z)
    check_gradient(model, (z, t, y), w)


def test_tapped_tokens_are_those_after_the_block() -> None:
    """The tokens after block k are those that the same model without the later blocks hands to its decoder."""
    model = tiny(patch_depth=3)
    z, t, y = batch()
    prediction, handed, blocks = model(z, t, y), [], model.patch_blocks
    model.condition.register_forward_pre_hook(lambda module, arguments: handed.append(arguments[0]))
    for k in (3, 1, 2):
        model.patch_blocks = blocks
        tapped_prediction, tokens = model(z, t, y, tap=k)
        assert torch.equal(tapped_prediction, prediction) and tokens.shape == (2, 16, 24)
        model.patch_blocks = blocks[:k]
        model(z, t, y)
        assert torch.equal(F.silu(model.t_embed(t)[:, None] + tokens), handed[-1]), k
    for k in (0, 4):
        with pytest.raises(ValueError, match=f"tap {k}: this DeCo has blocks 1 to 3"):
            model(z, t, y, tap=k)


def test_tables_keep_float32_when_the_model_is_cast() -> None:
    model = tiny()
    before = model.pixel_place.clone()
    model.bfloat16()
    assert model.condition.weight.dtype == torch.bfloat16
    assert model.pixel_place.dtype == torch.float32 and torch.equal(model.pixel_place, before)


def test_bfloat16_stays_near_float32() -> None:
    """Two bf16 digits (2^-8) through a dozen roundings; the output is bf16."""
    model = tiny()
    z, t, y = batch()
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    expected = model(z.bfloat16().float(), t, y)
    found = model.bfloat16()(z.bfloat16(), t, y)
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).norm() < 12 * 2**-8 * expected.norm()


@pytest.mark.parametrize("recompute", ["operators", "blocks"])
def test_recomputation_changes_no_name_and_no_gradient(recompute: str) -> None:
    plain, wrapped = tiny(), tiny()
    wrap_blocks(wrapped.blocks(), recompute=recompute, compile_blocks=False)
    assert list(plain.state_dict()) == list(wrapped.state_dict())
    for model in (plain, wrapped):
        model(*batch()).square().mean().backward()
    for (name, p), q in zip(plain.named_parameters(), wrapped.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), name


def test_a_decoder_block_is_one_graph() -> None:
    """torch.compile(fullgraph=True) traces forward and backward without a break; aot_eager compiles no code."""
    torch._dynamo.reset()
    block = tiny().decoder_blocks[0]
    x, y = torch.randn(6, 16, 8, requires_grad=True), torch.randn(6, 16, 8)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(block(x, y).square().sum(), x)[0]
    assert torch.allclose(torch.autograd.grad(compiled(x, y).square().sum(), x)[0], expected, rtol=1e-5, atol=1e-6)


def test_the_loss_has_its_three_parts_and_reaches_every_weight() -> None:
    """Flow, frequency and alignment, as in the published recipe."""
    model = tiny()
    alignment = FeatureAlignment(
        lambda images, numbers: torch.ones(2, 16, 5) * torch.arange(5), make_projector("mlp", 24, 5, 6),
        width=24, layer=1, weight=0.5, device=torch.device("cpu"),
    )  # fmt: skip
    module = FlowMatching(model, Objective(class_drop=0.2, frequency_weight=1.0), 11, 3, alignment)
    images = torch.randint(0, 256, (2, 16, 16, 3), dtype=torch.uint8)
    loss = module(images, torch.tensor([0, 2]), torch.tensor([5, 6]))
    loss.backward()
    parts = {name: value.item() for name, value in module.parts.items()}
    assert loss.item() == pytest.approx(parts["flow"] + parts["frequency"] + 0.5 * parts["alignment"], rel=1e-5)
    for name, parameter in module.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.any(), name


def test_it_learns_a_batch() -> None:
    """At the size of the digits: 60 steps of AdamW on one fixed batch bring its loss below half of the first."""
    torch.manual_seed(0)
    config = deco.Settings(hidden_size=96, num_heads=4, patch_depth=4, patch_size=4, decoder_width=16)
    model = deco.build(config, 16, num_classes=10)
    y = torch.arange(4)
    waves = torch.cos(torch.linspace(0, 3, 16)[None] * (1 + y[:, None]))
    x = rearrange(waves, "B H -> B 1 H 1") * rearrange(waves, "B W -> B 1 1 W").expand(4, 3, 16, 16)
    e, t = torch.randn(4, 3, 16, 16), torch.tensor([0.2, 0.4, 0.6, 0.8])
    z = add_noise(x, e, t)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)
    losses = []
    for _ in range(61):
        loss = flow_loss(model(z, t, y), x, e, t).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        assert all(p.grad.isfinite().all() for p in model.parameters())
    assert losses[0] == pytest.approx((x - e).square().mean().item(), rel=1e-5)
    assert losses[-1] < losses[0] / 2


def test_sizes_that_cannot_work_are_refused() -> None:
    with pytest.raises(ValueError, match="image_size 18 does not divide"):
        tiny(image_size=18)
    with pytest.raises(ValueError, match="decoder_depth 0"):
        tiny(decoder_depth=0)
    with pytest.raises(ValueError, match=r"\[B, 3, 16, 16\], got \[B, 3, 32, 32\]"):
        tiny()(torch.zeros(1, 3, 32, 32), torch.zeros(1), torch.zeros(1, dtype=torch.int64))
