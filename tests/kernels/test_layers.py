"""attention_layer and swiglu_layer: of any body, and the one node of csrc beside the operators that it is made of."""

import pytest
import torch
import torch.nn.functional as F
from pixelgen_kernels.attention import NATIVE_TOKENS, attention, attention_reference
from pixelgen_kernels.bodies import forced
from pixelgen_kernels.layers import attention_layer, swiglu_layer
from pixelgen_kernels.qk_norm_rope import qk_norm_rope, qk_norm_rope_reference
from pixelgen_kernels.swiglu_linear import swiglu_linear
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

HEADS, D = 3, 24


def attention_inputs(L: int = 6, d: int = 8, bias: bool = True) -> dict[str, Tensor]:
    torch.manual_seed(0)
    found = {
        "x": torch.randn(2, L, D),
        "qkv_weight": torch.randn(3 * HEADS * d, D) * 0.3,
        "q_norm_weight": torch.rand(d) + 0.5,
        "k_norm_weight": torch.rand(d) + 0.5,
        "proj_weight": torch.randn(16, HEADS * d) * 0.3,
    }
    return found | ({"proj_bias": torch.randn(16)} if bias else {})


def tables(L: int, d: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    angle = torch.arange(L, dtype=torch.float64)[:, None] * torch.linspace(0.1, 1.3, d // 2, dtype=torch.float64)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def attend(**given: Tensor) -> Tensor:
    x, d = given["x"], len(given["q_norm_weight"])
    weights = [given[name] for name in ("qkv_weight", "q_norm_weight", "k_norm_weight", "proj_weight")]
    return attention_layer(x, *weights, given.get("proj_bias"), *tables(x.shape[1], d, x.dtype), HEADS)


def attend_by_parts(**given: Tensor) -> Tensor:
    x, norms = given["x"], (given["q_norm_weight"], given["k_norm_weight"])
    q, k, v = qk_norm_rope(F.linear(x, given["qkv_weight"]), *norms, *tables(x.shape[1], len(norms[0])), HEADS)
    return F.linear(attention(q, k, v).flatten(2), given["proj_weight"], given.get("proj_bias"))


def attend_exactly(**given: Tensor) -> Tensor:
    x, norms = given["x"], (given["q_norm_weight"], given["k_norm_weight"])
    cos, sin = tables(x.shape[1], len(norms[0]), x.dtype)
    q, k, v = qk_norm_rope_reference(x @ given["qkv_weight"].t(), *norms, cos, sin, HEADS, 1e-6)
    out = attention_reference(q, k, v).flatten(2) @ given["proj_weight"].t()
    return out + given["proj_bias"] if "proj_bias" in given else out


def feed(x: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    return swiglu_layer(x, w13, w2)


def feed_by_parts(x: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    return swiglu_linear(F.linear(x, w13), w2)


def feed_exactly(x: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    a, b = (x @ w13.t()).chunk(2, dim=-1)
    return (a * torch.sigmoid(a) * b) @ w2.t()


def swiglu_inputs() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {"x": torch.randn(2, 5, D), "w13": torch.randn(2 * 20, D) * 0.3, "w2": torch.randn(16, 20) * 0.3}


CASES = {
    "attention": (attend, attend_by_parts, attend_exactly, attention_inputs()),
    "attention without bias": (attend, attend_by_parts, attend_exactly, attention_inputs(bias=False)),
    "attention of many tokens": (attend, attend_by_parts, attend_exactly, attention_inputs(L=NATIVE_TOKENS + 1)),
    "swiglu": (feed, feed_by_parts, feed_exactly, swiglu_inputs()),
}


def derived(function, given: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The output and the gradient of each input."""
    leaves = {name: x.to(dtype, copy=True).requires_grad_() for name, x in given.items()}
    out = function(**leaves)
    grads = torch.autograd.grad(out, list(leaves.values()), cotangent(out))
    return {"out": out.detach(), **dict(zip(leaves, grads, strict=True))}


def cotangent(out: Tensor) -> Tensor:
    """Of one sign, so that sums over tokens do not cancel."""
    return (1.0 + 0.5 * torch.arange(out.numel(), dtype=torch.float64).sin()).to(out.dtype).view(out.shape)


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_are_those_of_float64(case: str, body: str) -> None:
    layer, _, exact, given = CASES[case]
    found, wanted = derived(layer, given), derived(exact, given, torch.float64)
    for name, value in wanted.items():
        assert (found[name] - value).abs().max() <= 2e-6 * value.abs().max(), name


@pytest.mark.parametrize("case", CASES)
def test_the_native_node_gives_the_bits_of_its_operators(case: str) -> None:
    layer, parts, _, given = CASES[case]
    with forced("native"):
        found, wanted = derived(layer, given), derived(parts, given)
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


@pytest.mark.parametrize(("case", "node"), [("attention", "AttentionLayer"), ("swiglu", "SwiGLULayer")])
def test_it_is_one_native_node_and_only_wanted_gradients_are_made(case: str, node: str) -> None:
    layer, _, _, given = CASES[case]
    with forced("native"):
        every = derived(layer, given)
        for wanted in given:
            leaves = {name: x.clone().requires_grad_(name == wanted) for name, x in given.items()}
            out = layer(**leaves)
            assert node in out.grad_fn.name()
            (grad,) = torch.autograd.grad(out, leaves[wanted], cotangent(out))
            assert torch.equal(grad, every[wanted])
    with torch.no_grad():
        assert layer(**given).grad_fn is None


@pytest.mark.parametrize("case", ["attention", "swiglu"])
def test_who_counts_sees_every_product_of_a_native_node(case: str) -> None:
    layer, parts, _, given = CASES[case]
    counts = []
    for function in (layer, parts):
        with forced("native"), FlopCounterMode(display=False) as counter:
            derived(function, given)
        counts.append(counter.get_flop_counts()["Global"])
    assert counts[0] == counts[1] and sum(counts[0].values()) > 0


def test_what_does_not_fit_is_named() -> None:
    given = attention_inputs()
    with pytest.raises(ValueError, match=r"qkv|qk_norm_rope|k_norm_weight"):
        attend(**{**given, "k_norm_weight": torch.ones(7)})
    with pytest.raises(ValueError, match=r"w13 must be \[40, 24\]|packed"):
        feed(**{**swiglu_inputs(), "w13": torch.zeros(38, D)})
