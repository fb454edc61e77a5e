"""PixelDiT: published sizes and costs, its start, its symmetries, and its wrapping."""

import pytest
import torch
from einops import rearrange
from support.finite_differences import check_gradient
from support.models import tiny_of
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pixelgen_fast import layers, models
from pixelgen_fast.diffusion.loss import flow_loss
from pixelgen_fast.diffusion.path import Noising
from pixelgen_fast.engine.parallel import wrap_blocks
from pixelgen_fast.models import pixeldit

B = dict(hidden_size=768, num_heads=12, patch_depth=12, pixel_depth=2)
L = dict(hidden_size=1024, num_heads=16, patch_depth=22, pixel_depth=4)
XL = dict(hidden_size=1152, num_heads=16, patch_depth=26, pixel_depth=4)
tiny = tiny_of("pixeldit")


@pytest.mark.parametrize(
    ("size", "post", "parameters"),
    [
        (B, False, 184_749_155),
        (L, False, 569_648_963),
        (XL, False, 797_383_203),
        (B, True, 172_149_859),
        (L, True, 536_061_763),
        (XL, True, 759_601_699),
    ],
)
def test_published_parameter_counts(size: dict, post: bool, parameters: int) -> None:
    with torch.device("meta"):
        model = pixeldit.build(pixeldit.Settings(**size, post_modulation=post), 256, 1000)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == parameters


def test_registers_cost_their_tokens_and_leave_the_other_weights_as_they_were() -> None:
    with torch.device("meta"):
        model = pixeldit.build(pixeldit.Settings(**XL, registers=4), 256, 1000)
    assert sum(p.numel() for p in model.parameters()) == 797_383_203 + 4 * 1152
    plain, registers = (tiny(randomise=False, registers=k).state_dict() for k in (0, 3))
    assert registers.pop("registers.tokens").shape == (3, 24) and plain.keys() == registers.keys()
    assert all(torch.equal(plain[name], registers[name]) for name in plain)


def test_registers_are_seen_stand_nowhere_and_are_dropped() -> None:
    """The order of tokens without a place does not matter, their values do; what they become leaves with the blocks."""
    model = tiny(registers=3).double()
    z, t, y = torch.randn(2, 3, 16, 16, dtype=torch.float64), torch.rand(2, dtype=torch.float64), torch.tensor([0, 3])
    before, tokens = model(z, t, y, tap=2)
    assert tokens.shape == (2, 16, 24)
    with torch.no_grad():
        model.registers.tokens.copy_(model.registers.tokens.flip(0))
    torch.testing.assert_close(model(z, t, y), before, rtol=0, atol=1e-12)
    with torch.no_grad():
        model.registers.tokens[0] += 1
    assert (model(z, t, y) - before).abs().max() > 1e-3
    # through attention alone
    plain = tiny().double()
    for one in (model, plain):
        for block in one.patch_blocks:
            nn.init.zeros_(block.attn.proj.weight)
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "registers" not in k})
    torch.testing.assert_close(model(z, t, y), plain(z, t, y), rtol=0, atol=1e-12)


@pytest.mark.parametrize("body", ["reference", "triton"])
def test_a_fused_loss_with_registers_is_that_of_the_prediction(body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIXELGEN_OPS", body)
    model, y, weight = tiny(registers=3), torch.tensor([0, 3]), torch.tensor([0.5, 2.0])
    images = torch.randint(0, 256, (2, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    noising = Noising(torch.tensor([5, 6]), torch.tensor([0.3, 0.8]), 7, 1.0)
    z, x, e = noising.of(images)
    losses = (
        model.velocity_loss(images, y, noising, weight),
        weight * flow_loss(model(z, noising.t, y), x, e, noising.t),
    )
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)
    for loss_B in losses:
        loss_B.sum().backward()
    assert model.registers.tokens.grad.abs().sum() > 0


@pytest.mark.parametrize("body", ["reference", "triton"])
@pytest.mark.parametrize(
    ("size", "pixels", "gflops"), [(B, 256, 75.43), (L, 256, 227.77), (XL, 256, 311.19), (XL, 512, 1352.24)]
)
def test_published_flops(size: dict, pixels: int, gflops: float, body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted by operator, also where the operators are ours."""
    monkeypatch.setenv("PIXELGEN_OPS", body)
    monkeypatch.setattr(layers.SwiGLU, "MULTIPLE", 1)  # columns of zeros are no work of the model
    with torch.device("meta"):
        model = pixeldit.build(pixeldit.Settings(**size), pixels, 1000)
        arguments = torch.empty(1, 3, pixels, pixels), torch.empty(1), torch.zeros(1, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*arguments)
    assert counter.get_total_flops() / 1e9 == pytest.approx(gflops, abs=0.005)


def test_first_output_is_zero() -> None:
    model = tiny(randomise=False)
    assert torch.equal(model(torch.randn(2, 3, 16, 16), torch.rand(2), torch.tensor([0, 3])), torch.zeros(2, 3, 16, 16))


@pytest.mark.parametrize("post", [False, True])
def test_images_of_a_batch_do_not_mix(post: bool) -> None:
    model = tiny(post_modulation=post).double()
    z, t, y = (
        torch.randn(3, 3, 16, 16, dtype=torch.float64),
        torch.rand(3, dtype=torch.float64),
        torch.tensor([0, 1, 3]),
    )
    together = model(z, t, y)
    alone = torch.cat([model(z[i : i + 1], t[i : i + 1], y[i : i + 1]) for i in range(3)])
    assert torch.allclose(together, alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("registers", [0, 3])
def test_gradient_is_that_of_finite_differences(registers: int) -> None:
    """In float64, along a random direction in all parameters at once."""
    model = tiny(registers=registers).double()
    z, t, y = torch.randn(2, 3, 16, 16, dtype=torch.float64), torch.rand(2, dtype=torch.float64), torch.tensor([0, 3])
    w = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    check_gradient(model, (z, t, y), w)


def test_rope_scores_depend_on_relative_position_only() -> None:
    cos, sin = layers.rope_2d(1, 9, 16)
    q, k = torch.randn(16), torch.randn(16)

    def rotated(x: torch.Tensor, i: int) -> torch.Tensor:
        pairs = torch.view_as_complex(x.reshape(-1, 2)) * torch.complex(cos[i], sin[i])
        return torch.view_as_real(pairs).flatten()

    scores = [float(rotated(q, i) @ rotated(k, i + 3)) for i in range(6)]
    assert scores == pytest.approx([scores[0]] * 6, abs=1e-5)


def test_positions_span_the_same_interval_at_any_resolution() -> None:
    coarse, fine = layers.rope_2d(3, 3, 8)[0], layers.rope_2d(5, 5, 8)[0]
    every_other = rearrange(rearrange(fine, "(h w) d -> h w d", h=5)[::2, ::2], "h w d -> (h w) d")
    assert torch.allclose(coarse, every_other, atol=1e-6)


def test_tables_keep_float32_when_the_model_is_cast() -> None:
    model = tiny()
    before = model.rope_sin.clone()
    model.bfloat16()
    assert model.head.linear.weight.dtype == torch.bfloat16
    assert model.rope_sin.dtype == torch.float32 and torch.equal(model.rope_sin, before)


@pytest.mark.parametrize("post", [False, True])
@pytest.mark.parametrize("float32_stream", [False, True])
def test_bfloat16_stays_near_float32(post: bool, float32_stream: bool) -> None:
    """Two bf16 digits (2^-8) through a dozen roundings; the output is bf16."""
    model = tiny(post_modulation=post, pixel_stream_float32=float32_stream)
    z, t, y = torch.randn(2, 3, 16, 16).bfloat16().float(), torch.rand(2), torch.tensor([0, 3])
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    expected = model(z, t, y)
    found = model.bfloat16()(z.bfloat16(), t, y)
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).norm() < 12 * 2**-8 * expected.norm()


@pytest.mark.parametrize("recompute", ["operators", "blocks"])
@pytest.mark.parametrize("body", ["reference", "triton"])
def test_recomputation_changes_no_name_and_no_gradient(
    recompute: str, body: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIXELGEN_OPS", body)
    plain, wrapped = tiny(), tiny()
    wrap_blocks(wrapped.blocks(), recompute=recompute, compile_blocks=False)
    assert list(plain.state_dict()) == list(wrapped.state_dict())
    z, t, y = torch.randn(2, 3, 16, 16), torch.rand(2), torch.tensor([0, 3])
    for model in (plain, wrapped):
        model(z, t, y).square().mean().backward()
    for (name, p), q in zip(plain.named_parameters(), wrapped.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), name


@pytest.mark.parametrize(("body", "post"), [("reference", False), ("reference", True), ("triton", False)])
def test_the_whole_model_is_one_graph(body: str, post: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile(fullgraph=True) traces forward and backward without a break; aot_eager compiles no code."""
    monkeypatch.setenv("PIXELGEN_OPS", body)
    torch._dynamo.reset()
    model = tiny(post_modulation=post, patch_depth=1, pixel_depth=1)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    z, t, y = torch.randn(2, 3, 16, 16), torch.rand(2), torch.tensor([0, 3])
    expected = torch.autograd.grad(model(z, t, y).square().sum(), model.patch_embed.weight)[0]
    found = torch.autograd.grad(compiled(z, t, y).square().sum(), model.patch_embed.weight)[0]
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_compiling_blocks_changes_no_name() -> None:
    plain, wrapped = tiny(), tiny()
    wrap_blocks(wrapped.blocks(), recompute="blocks", compile_blocks=True)
    assert list(plain.state_dict()) == list(wrapped.state_dict())


def test_sizes_that_cannot_work_are_refused() -> None:
    with pytest.raises(ValueError, match="image_size 18 does not divide"):
        tiny(image_size=18)
    with pytest.raises(ValueError, match="head size 4.8"):
        tiny(num_heads=5)
    with pytest.raises(ValueError, match="pixel_depth 0"):
        tiny(pixel_depth=0)
    with pytest.raises(ValueError, match="model.registers 2 are for patch blocks"):
        pixeldit.PixelDiT(pixeldit.Settings(patch_depth=0, registers=2), 16, 3, patch_embed=nn.Linear(4, 1152))
    with pytest.raises(ValueError, match=r"\[B, 3, 16, 16\], got \[B, 3, 32, 32\]"):
        tiny()(torch.zeros(1, 3, 32, 32), torch.zeros(1), torch.zeros(1, dtype=torch.int64))


def test_unknown_system_lists_the_valid_ones() -> None:
    with pytest.raises(ValueError, match="unknown system 'dit'; valid: .*pixeldit"):
        models.system_module("dit")
