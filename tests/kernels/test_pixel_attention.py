"""The pixel head's attention as one composed operator, and what backward keeps of it."""

import pytest
import torch
from pixelgen_kernels import PixelAttentionWeights
from pixelgen_kernels import pixel_attention as public
from pixelgen_kernels.pixel_attention import pixel_attention_reference as reference

SHAPE = (2, 5, 4, 8, 24, 4)  # B, L, P, C, D, heads


def inputs(B, L, P, C, D, heads, device, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)

    def randn(*shape, scale=1.0, mean=0.0):
        return (mean + scale * torch.randn(*shape, generator=generator)).to(device, dtype)

    d = D // heads
    weights = {
        "norm_weight": randn(C, scale=0.3, mean=1),
        "compress_weight": randn(D, P * C, scale=(P * C) ** -0.5),
        "compress_bias": randn(D, scale=0.3),
        "qkv_weight": randn(3 * D, D, scale=D**-0.5),
        "q_norm_weight": randn(d, scale=0.3, mean=1),
        "k_norm_weight": randn(d, scale=0.3, mean=1),
        "proj_weight": randn(D, D, scale=D**-0.5),
        "proj_bias": randn(D, scale=0.3),
        "expand_weight": randn(P * C, D, scale=D**-0.5),
        "expand_bias": randn(P * C, scale=0.3),
    }
    given = {"x_NPC": randn(B * L, P, C), "modulation": randn(B * L, P, 2 * C, scale=0.5)} | weights
    angle = torch.randn(L, d // 2, generator=generator).to(device)
    return given, (angle.cos(), angle.sin()), randn(B * L, P, C)


def call(function, tables, heads, **options):
    """function of flat keyword tensors, with the tables in their type."""

    def run(x_NPC, modulation=None, **weights):
        cos, sin = (t.to(torch.promote_types(x_NPC.dtype, torch.float32)) for t in tables)
        return function(x_NPC, modulation, PixelAttentionWeights(**weights), cos, sin, heads, **options)

    return run


def test_without_modulation(body, device, gradients, assert_close):
    given, tables, de = inputs(*SHAPE, device)
    del given["modulation"]
    (e,), grads = gradients(call(public, tables, 4), given, [de])
    (e_ref,), refs = gradients(call(reference, tables, 4), given, [de], dtype=torch.float64)
    assert_close("pixel_attention", "e", e, e_ref)
    for name in given:
        assert_close("pixel_attention", f"d{name}", grads[name], refs[name])


def test_recomputing_gives_the_same_bits(body, device, gradients):
    given, tables, de = inputs(*SHAPE, device)
    (e,), grads = gradients(call(public, tables, 4), given, [de])
    (again,), regrads = gradients(call(public, tables, 4, save="recompute"), given, [de])
    assert torch.equal(e, again)
    assert all(torch.equal(grads[name], regrads[name]) for name in given)


@pytest.mark.parametrize("save", ["store", "recompute"])
def test_saved_bytes(save, monkeypatch):
    """At the size of an XL image in bfloat16, on the meta device: inputs, and P C + 8 D numbers a patch or nothing."""
    monkeypatch.setenv("PIXELGEN_OPS", "triton")
    B, L, P, C, D, heads = 1, 256, 256, 16, 1152, 16
    given, tables, _ = inputs(1, 1, 1, C, 16, 1, "cpu")
    shapes = {
        "x_NPC": (L, P, C), "modulation": (L, P, 2 * C), "norm_weight": (C,), "compress_weight": (D, P * C),
        "compress_bias": (D,), "qkv_weight": (3 * D, D), "q_norm_weight": (72,), "k_norm_weight": (72,),
        "proj_weight": (D, D), "proj_bias": (D,), "expand_weight": (P * C, D), "expand_bias": (P * C,),
    }  # fmt: skip
    assert shapes.keys() == given.keys()
    leaves = {
        name: torch.empty(shape, dtype=torch.bfloat16, device="meta", requires_grad=True)
        for name, shape in shapes.items()
    }
    tables = tuple(torch.empty(L, D // heads // 2, device="meta") for _ in tables)
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        saved[storage._cdata] = (tensor, storage.nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call(public, tables, heads, save=save)(**leaves)
    for tensor in (*leaves.values(), *tables):
        saved.pop(tensor.untyped_storage()._cdata, None)
    kept = sum(size for _, size in saved.values())
    log_sum_exp = B * heads * L * 4
    assert kept == (2 * L * (P * C + 8 * D) + log_sum_exp if save == "store" else 0)


def test_recomputing_compiles_to_one_graph(compiled_body, device, gradients):
    given, tables, de = inputs(*SHAPE, device)
    function = call(public, tables, 4, save="recompute")
    (e,), grads = gradients(function, given, [de])
    (e_compiled,), grads_compiled = gradients(torch.compile(function, fullgraph=True, backend="aot_eager"), given, [de])
    assert torch.equal(e, e_compiled)
    assert all(torch.equal(grads[name], grads_compiled[name]) for name in given)


def test_the_stream_may_be_wider_than_the_weights(device):
    """A float32 pixel stream with bfloat16 projections; e has their type."""
    given, tables, _ = inputs(*SHAPE, device)
    weights = {
        n: t if n == "norm_weight" else t.bfloat16() for n, t in given.items() if n not in ("x_NPC", "modulation")
    }
    e = call(public, tables, 4)(given["x_NPC"], given["modulation"], **weights)
    e_ref = call(reference, tables, 4)(given["x_NPC"], given["modulation"], **weights)
    assert e.dtype == e_ref.dtype == torch.bfloat16
    torch.testing.assert_close(e, e_ref, rtol=0.1, atol=0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_NPC": torch.zeros(10, 32)}, r"x must be \[N, P, C\]"),
        ({"x_NPC": torch.zeros(9, 4, 8)}, "9 patches are not a whole number of images of 5 patches"),
        ({"expand_weight": torch.zeros(24, 32)}, r"expand_weight must be \[32, 24\], got \[24, 32\]"),
        ({"qkv_weight": torch.zeros(24, 72).t()}, "qkv_weight must be contiguous"),
        ({"proj_bias": torch.zeros(24).bfloat16()}, "proj_bias must be torch.float32 like compress_weight"),
        ({"compress_weight": torch.zeros(20, 32)}, r"width 20 with 4 heads needs tables \[5, 2.5\], got \[5, 3\]"),
    ],
)
def test_bad_input_is_named(change, message, device):
    given, tables, _ = inputs(*SHAPE, device)
    with pytest.raises(ValueError, match=message):
        call(public, tables, 4)(**(given | {name: tensor.to(device) for name, tensor in change.items()}))


def test_an_unknown_way_of_saving_is_refused(device):
    given, tables, _ = inputs(*SHAPE, device)
    with pytest.raises(ValueError, match="save must be one of store, recompute, got 'none'"):
        call(public, tables, 4, save="none")(**given)


@pytest.mark.gpu
@pytest.mark.parametrize("save", ["store", "recompute"])
def test_bfloat16(save, gradients, assert_close):
    shape = (2, 64, 64, 16, 288, 4)
    given, tables, de = inputs(*shape, "cuda", torch.bfloat16)
    (e,), grads = gradients(call(public, tables, 4, save=save), given, [de])
    (e_ref,), refs = gradients(call(reference, tables, 4), given, [de], dtype=torch.float64)
    assert_close("pixel_attention", "e", e, e_ref)
    for name in given:
        assert_close("pixel_attention", f"d{name}", grads[name], refs[name])
