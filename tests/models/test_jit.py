"""JiT: published sizes and costs, its start, its context tokens, its dropout, and its wrapping."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from support.finite_differences import check_gradient
from support.models import batch, tiny_of
from torch import nn

from pixelgen_fast import config as cfg
from pixelgen_fast import layers, models
from pixelgen_fast.cli import main
from pixelgen_fast.config import Objective
from pixelgen_fast.engine.metrics import forward_flops
from pixelgen_fast.engine.objective import FlowMatching
from pixelgen_fast.engine.parallel import wrap_blocks
from pixelgen_fast.models import jit

CONFIGS = Path(__file__).parent.parent.parent / "configs"
B = dict(hidden_size=768, num_heads=12, depth=12, bottleneck=128, context_start=4)
L = dict(hidden_size=1024, num_heads=16, depth=24, bottleneck=128, context_start=8)
H = dict(hidden_size=1280, num_heads=16, depth=32, bottleneck=256, context_start=10)
G = dict(hidden_size=1664, num_heads=16, depth=40, bottleneck=256, context_start=10)
tiny = tiny_of("jit")


@pytest.mark.parametrize(
    ("size", "patch", "pixels", "parameters"),
    [
        (B, 16, 256, 131_123_712),
        (L, 16, 256, 458_877_664),
        (H, 16, 256, 952_514_368),
        (B, 32, 512, 133_190_400),
        (L, 32, 512, 461_534_176),
        (H, 32, 512, 956_055_616),
    ],
)
def test_published_parameter_counts(size: dict, patch: int, pixels: int, parameters: int) -> None:
    with torch.device("meta"):
        model = jit.build(jit.Settings(**size, patch_size=patch), pixels, 1000)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == parameters


@pytest.mark.parametrize(("size", "gflops"), [(B, 50.45), (L, 175.89)])
@pytest.mark.parametrize("body", ["reference", "triton"])
def test_flops_counted_on_the_public_code(
    size: dict, gflops: float, body: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIXELGEN_OPS", body)
    monkeypatch.setattr(layers.SwiGLU, "MULTIPLE", 1)  # columns of zeros are no work of the model
    with torch.device("meta"):
        model = jit.build(jit.Settings(**size), 256, 1000)
    assert forward_flops(model) / 1e9 == pytest.approx(gflops, abs=0.005)


@pytest.mark.parametrize(("size", "multiply_adds"), [(B, 25), (L, 88), (H, 182), (G, 383)])
def test_published_multiply_adds(size: dict, multiply_adds: int) -> None:
    """The paper prints whole 1e9 multiply-adds; G has no other published count."""
    with torch.device("meta"):
        model = jit.build(jit.Settings(**size), 256, 1000)
    assert forward_flops(model) / 2e9 == pytest.approx(multiply_adds, abs=1)


def test_first_output_is_zero_and_blocks_start_as_the_identity() -> None:
    model = tiny(randomise=False)
    z, t, y = batch()
    output, tokens = model(z, t, y, tap=4)
    assert torch.equal(output, torch.zeros(2, 3, 16, 16))
    assert torch.equal(tokens, model.patch_embed(z) + model.position)


def test_images_of_a_batch_do_not_mix() -> None:
    model = tiny().double()
    z, t, y = torch.randn(3, 3, 16, 16).double(), torch.rand(3).double(), torch.tensor([0, 1, 3])
    alone = torch.cat([model(z[i : i + 1], t[i : i + 1], y[i : i + 1]) for i in range(3)])
    assert torch.allclose(model(z, t, y), alone, rtol=0, atol=1e-12)


def test_gradient_is_that_of_finite_differences() -> None:
    """In float64, along a random direction in all parameters at once."""
    model = tiny().double()
    z, t, y = batch(torch.float64)
    w = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    check_gradient(model, (z, t, y), w)


def test_rope_turns_by_whole_rows_and_columns() -> None:
    """Against complex numbers: pair k of the first half by exp(i row f_k), of the second by exp(i column f_k)."""
    cos, sin = layers.rope_2d_axial(3, 5, 12)
    frequencies = torch.tensor([1e4 ** (-k / 3) for k in range(3)], dtype=torch.float64)
    for place in range(15):
        row, column = divmod(place, 5)
        expected = torch.exp(1j * torch.cat([row * frequencies, column * frequencies]))
        assert torch.allclose(torch.complex(cos[place], sin[place]).to(expected.dtype), expected, atol=1e-6)


@pytest.mark.parametrize("tap", [1, 2, 4])
def test_tap_gives_the_patch_tokens_only(tap: int) -> None:
    """Before context tokens enter and after; the last block's tokens give the prediction through the head's formula."""
    model = tiny()
    z, t, y = batch()
    output, tokens = model(z, t, y, tap=tap)
    assert tokens.shape == (2, 16, 24)
    assert torch.equal(output, model(z, t, y))
    if tap < model.tap_depth:
        return
    c = F.silu(model.t_embed(t) + model.y_embed(y))
    shift, scale = model.head.modulation(c)[:, None].chunk(2, dim=-1)
    norm = F.rms_norm(tokens, (24,), model.head.norm.weight, 1e-6)
    patches = model.head.linear(norm * (1 + scale) + shift)
    expected = rearrange(patches, "B (h w) (p q C) -> B C (h p) (w q)", h=4, p=4, q=4)
    assert torch.allclose(output, expected, rtol=1e-4, atol=1e-4)


def test_context_tokens_act_from_their_block_on() -> None:
    model, other = tiny(context_start=2), tiny(context_start=2)
    nn.init.normal_(other.context_position)
    z, t, y = batch()
    before, after = ([m(z, t, y, tap=k)[1] for m in (model, other)] for k in (2, 3))
    assert torch.equal(*before) and not torch.allclose(*after)
    assert (model.rope_cos[:3] == 1).all() and (model.rope_sin[:3] == 0).all()


def test_context_tokens_can_be_left_out() -> None:
    model = tiny(context_length=0, context_start=0)
    assert model.context_position is None
    assert model(*batch(), tap=4)[1].shape == (2, 16, 24)


def test_null_class_is_one_more_class() -> None:
    model = tiny()
    z, t, _ = batch()
    outputs = [model(z, t, torch.tensor([y, y])) for y in range(4)]
    assert all(not torch.allclose(outputs[3], outputs[y]) for y in range(3))
    with pytest.raises(IndexError):
        model(z, t, torch.tensor([4, 4]))


def test_dropout_acts_in_the_middle_half_in_training_only() -> None:
    model = tiny(depth=8, dropout=0.5)
    assert model.draws and not tiny().draws
    dropped = [(b.attn.dropout, b.mlp.dropout) for b in model.transformer]
    assert dropped == [(0.0, 0.0)] * 2 + [(0.5, 0.5)] * 4 + [(0.0, 0.0)] * 2
    without, arguments = tiny(depth=8), batch()
    first, second = model(*arguments, tap=2), model(*arguments, tap=2)
    assert torch.equal(first[1], second[1]) and not torch.allclose(first[0], second[0])
    torch.manual_seed(5)
    again = model(*arguments)
    torch.manual_seed(5)
    assert torch.equal(again, model(*arguments))
    assert torch.equal(model.eval()(*arguments), without(*arguments))


def test_dropout_keeps_the_expectation() -> None:
    """Of the feed-forward layer and of attention, whose output is linear in what is dropped: 4 standard errors."""
    torch.manual_seed(0)
    x, (cos, sin) = torch.randn(1, 4, 16), layers.rope_2d_axial(2, 2, 8)
    mlp, attention = layers.SwiGLU(16, 24, bias=True, dropout=0.25), layers.Attention(16, 2, dropout=0.25)
    for layer, arguments in ((mlp, (x,)), (attention, (x, cos, sin))):
        drawn = torch.cat([layer(*arguments).detach() for _ in range(2000)])
        expected = layer.eval()(*arguments).detach()[0]
        assert ((drawn.mean(0) - expected).abs() <= 4.5 * drawn.std(0) / 2000**0.5 + 1e-6).all()
        assert (drawn.std(0) > 0).all()


def test_tables_keep_float32_and_stay_out_of_the_weights() -> None:
    model = tiny()
    before = model.position.clone()
    assert not {"rope_cos", "rope_sin", "position"} & model.state_dict().keys()
    model.bfloat16()
    assert model.head.linear.weight.dtype == torch.bfloat16
    assert model.position.dtype == torch.float32 and torch.equal(model.position, before)


def test_bfloat16_stays_near_float32() -> None:
    """Two bf16 digits (2^-8) through a dozen roundings; the output is bf16."""
    model = tiny()
    z, t, y = batch()
    z = z.bfloat16().float()
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    expected = model(z, t, y)
    found = model.bfloat16()(z.bfloat16(), t, y)
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).norm() < 12 * 2**-8 * expected.norm()


@pytest.mark.parametrize(
    ("recompute", "body", "dropout"),
    [
        ("operators", "reference", 0.0),
        ("operators", "reference", 0.3),
        ("blocks", "reference", 0.3),
        ("operators", "triton", 0.0),
    ],
)
def test_recomputation_changes_no_name_and_no_gradient(
    recompute: str, body: str, dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with dropout, which must draw the same again."""
    monkeypatch.setenv("PIXELGEN_OPS", body)
    depth = 4 if body == "reference" else 2
    plain, wrapped = (tiny(depth=depth, dropout=dropout) for _ in range(2))
    wrap_blocks(wrapped.blocks(), recompute=recompute, compile_blocks=False)
    assert list(plain.state_dict()) == list(wrapped.state_dict())
    for model in (plain, wrapped):
        torch.manual_seed(3)
        model(*batch()).square().mean().backward()
    for (name, p), q in zip(plain.named_parameters(), wrapped.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), name


def test_the_whole_model_is_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile(fullgraph=True) traces forward and backward without a break; aot_eager compiles no code."""
    monkeypatch.setenv("PIXELGEN_OPS", "reference")
    torch._dynamo.reset()
    model = tiny(depth=2)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    weight = model.patch_embed.down.weight
    expected = torch.autograd.grad(model(*batch()).square().sum(), weight)[0]
    found = torch.autograd.grad(compiled(*batch()).square().sum(), weight)[0]
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_learns_a_batch_through_the_objective() -> None:
    """Predicting x, compared in v, as published; sixty steps halve the loss of eight images."""
    model = tiny(randomise=False, hidden_size=48)
    objective = Objective(predict="x", loss="v", time_mean=-0.8, time_std=0.8, noise_scale=16 / 256)
    flow = FlowMatching(model, objective, seed=0, null_class=3)
    images = torch.randint(0, 256, (8, 1, 1, 3), generator=torch.Generator().manual_seed(2)).expand(8, 16, 16, 3)
    images, labels, numbers = images.to(torch.uint8).contiguous(), torch.arange(8) % 3, torch.arange(8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = flow(images, labels, numbers)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": 5}, "image_size 16 does not divide into model.patch_size 5 patches"),
        ({"depth": 0}, "model.depth 0 and model.bottleneck 6 must be at least 1"),
        ({"bottleneck": 0}, "model.bottleneck 0 must be at least 1"),
        ({"context_start": 4}, "model.context_start 4 names no block; model.depth 4 has blocks 0 to 3"),
        ({"context_start": -1}, "model.context_start -1 names no block"),
        ({"context_length": -2}, "model.context_length -2 must not be negative"),
        ({"dropout": 1.0}, r"model.dropout 1.0 is a probability in \[0, 1\)"),
        ({"num_heads": 5}, "hidden size 24 over 5 heads"),
    ],
)
def test_sizes_that_cannot_work_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**changes)


def test_other_images_and_taps_are_refused() -> None:
    model = tiny()
    z, t, y = batch()
    with pytest.raises(ValueError, match=r"images \[B, 3, 16, 16\], got \[B, 3, 16, 8\]"):
        model(z[..., :8], t, y)
    for tap in (0, 5):
        with pytest.raises(ValueError, match=f"tap {tap}: this JiT has blocks 1 to 4"):
            model(z, t, y, tap=tap)


@pytest.mark.parametrize(
    ("name", "parameters", "gflops"), [("jit_b_256", "131,123,712", "50.45"), ("jit_h_512", "956,055,616", "365.70")]
)
def test_dry_run_of_a_shipped_configuration(
    name: str, parameters: str, gflops: str, capsys: pytest.CaptureFixture
) -> None:
    assert main(["train", str(CONFIGS / f"{name}.yaml"), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert parameters in printed and f"{gflops} forward" in printed and "stage 3" in printed


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("jit_*.yaml")), ids=lambda p: p.stem)
def test_shipped_configurations_follow_the_recipe(path: Path) -> None:
    """Noise grows with the image, the patch with it, and 5 epochs of 1,281,167 images warm up 600."""
    config = cfg.load(path, [], models.model_schema)
    assert config.objective.noise_scale == config.data.image_size / 256 == config.model.patch_size / 16
    assert (config.optimizer.warmup_images, config.train.images) == (5 * 1_281_167, 600 * 1_281_167)
    cfg.check_world(config, 8)


def test_the_system_is_known_by_its_name() -> None:
    assert models.system_module("jit").Settings is jit.Settings
