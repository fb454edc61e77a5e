"""The per-pixel half of a pixel block: extreme values, large tensors, and what an operator owes its callers."""

import pytest
import torch
import triton.language as tl
from pixelgen_kernels import pixel_mlp as public
from pixelgen_kernels.pixel_mlp import pixel_mlp_bwd_kernel
from pixelgen_kernels.pixel_mlp import pixel_mlp_fwd_kernel as fwd_kernel
from pixelgen_kernels.pixel_mlp import pixel_mlp_reference as reference
from pixelgen_kernels.registration import kernels

EPS = 1e-6


def inputs(N, P, C, F, device, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)

    def randn(*shape, scale=1.0):
        return (scale * torch.randn(*shape, generator=generator)).to(device, dtype)

    found = {
        "x_NPC": randn(N, P, C),
        "e_NPC": randn(N, P, C),
        "modulation": randn(N, P, 4 * C, scale=0.7),
        "norm_weight_C": 1 + randn(C, scale=0.3),
        "w1": randn(F, C, scale=2 / C**0.5),
        "b1": randn(F, scale=0.5),
        "w2": randn(C, F, scale=1 / F**0.5),
        "b2": randn(C, scale=0.5),
    }
    return found, randn(N, P, C)


def test_large_hidden_values_saturate(body, device, gradients, assert_close):
    """A hidden layer of +-1e4: the exact GELU is the identity or 0 there, and so is its derivative 1 or 0."""
    given, dy = inputs(1, 4, 16, 64, device)
    given["b1"] = 1e4 * given["b1"].sign()
    (y,), grads = gradients(public, given, [dy])
    assert_close("pixel_mlp", "y", y, reference(*(x.double() for x in given.values()), False, "none", EPS))
    assert all(grad.isfinite().all() for grad in grads.values())


def test_registration(device):
    given, dy = inputs(2, 4, 16, 64, device)
    arguments = tuple(t.requires_grad_() for t in given.values())
    torch.library.opcheck(kernels.pixel_mlp, (*arguments, False, "none", EPS))
    detached = tuple(t.detach() for t in arguments)
    torch.library.opcheck(kernels.pixel_mlp_backward, (dy, *detached, True, "tanh", EPS))


def test_offsets_past_two_to_the_31(addresses):
    """The last block ends with pixel 2^29 + 2 of 16 channels: modulation element 2^35 + 191."""
    block, pixel, C, F = 16, 2**29 + 2, 16, 16
    M, program = pixel + 1, pixel // block
    sizes = {
        "M": M, "blocks": program + 1, "eps": EPS, "C": C, "F": F, "POST": False, "TANH": False, "EVEN": False,
        "DTYPE": tl.float32, "BLOCK_M": block, "BLOCK_C": C, "BLOCK_F": F, "STAGES": 1,
    }  # fmt: skip
    pixels = range(program * block, M)
    rows = list(range(pixels[0] * C, M * C))
    slots = list(range(pixels[0] * 4 * C, M * 4 * C))
    assert slots[0] > 2**31
    weights = dict.fromkeys(("norm_weight_ptr", "w1_ptr", "b1_ptr", "w2_ptr", "b2_ptr"), torch.float32)
    names = ("x_ptr", "e_ptr", "mod_ptr", "y_ptr")
    touched = addresses(fwd_kernel, (program, 0, 0), **dict.fromkeys(names, torch.float32), **weights, **sizes)
    assert touched["mod_ptr"].tolist() == slots
    assert touched["x_ptr"].tolist() == touched["e_ptr"].tolist() == touched["y_ptr"].tolist() == rows
    names = ("dy_ptr", "x_ptr", "e_ptr", "mod_ptr", "dx_ptr", "de_ptr", "dmod_ptr", "partial_ptr")
    touched = addresses(
        pixel_mlp_bwd_kernel, (program, 0, 0), **dict.fromkeys(names, torch.float32), **weights, **sizes
    )
    assert touched["dmod_ptr"].tolist() == touched["mod_ptr"].tolist() == slots
    assert all(touched[name].tolist() == rows for name in ("dy_ptr", "x_ptr", "e_ptr", "dx_ptr", "de_ptr"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_NPC": torch.zeros(6, 16)}, r"x must be \[N, P, C\] and w1 \[F, C\], got \[6, 16\]"),
        ({"e_NPC": torch.zeros(2, 4, 8)}, r"e must be \[2, 4, 16\], got \[2, 4, 8\]"),
        ({"modulation": torch.zeros(2, 4, 96)}, r"modulation must be \[2, 4, 64\], got \[2, 4, 96\]"),
        ({"w2": torch.zeros(64, 16)}, r"w2 must be \[16, 64\], got \[64, 16\]"),
        ({"w2": torch.zeros(64, 16).t()}, "w2 must be contiguous"),
        ({"w2": torch.zeros(16, 64, dtype=torch.bfloat16)}, "w2 must be torch.float32 like w1, got torch.bfloat16"),
        ({"gelu": "erf"}, "gelu must be one of none, tanh, got 'erf'"),
    ],
)
def test_bad_input_is_named(change, message, device):
    given, _ = inputs(2, 4, 16, 64, device)
    changed = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in change.items()}
    with pytest.raises(ValueError, match=message):
        public(**(given | changed))


@pytest.mark.gpu
@pytest.mark.parametrize("gelu", ["none", "tanh"])
@pytest.mark.parametrize("post", [False, True])
@pytest.mark.parametrize("shape", [(50, 256, 16, 64), (51, 64, 8, 32), (3, 16, 32, 128)], ids=str)
def test_bfloat16(shape, post, gelu, gradients, assert_close):
    given, dy = inputs(*shape, "cuda", torch.bfloat16)
    (y,), grads = gradients(public, given, [dy], post=post, gelu=gelu)
    (y_ref,), refs = gradients(reference, given, [dy], dtype=torch.float64, post=post, gelu=gelu, eps=EPS)
    assert_close("pixel_mlp", "y", y, y_ref)
    for name in given:
        assert_close("pixel_mlp", f"d{name}", grads[name], refs[name])
