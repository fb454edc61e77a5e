"""Pixel-wise modulated RMSNorm: mixed types, large tensors, and what an operator owes its callers."""

import pytest
import torch
from pixelgen_kernels import pixel_modulate as public
from pixelgen_kernels.agreement import relative_error
from pixelgen_kernels.pixel_modulate import pixel_modulate_bwd_kernel
from pixelgen_kernels.pixel_modulate import pixel_modulate_fwd_kernel as fwd_kernel
from pixelgen_kernels.pixel_modulate import pixel_modulate_reference as reference
from pixelgen_kernels.registration import kernels
from support.operator_runs import moved

EPS = 1e-6


def inputs(N, P, C, device, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=generator).to(device, dtype)

    given = {"x_NPC": 2 * randn(N, P, C), "norm_weight_C": 1 + 0.3 * randn(C), "modulation": 0.5 * randn(N, P, 2 * C)}
    return given, randn(N, P, C)


def test_streams_may_differ_in_type(body, device, gradients, assert_close):
    """A float32 pixel stream between bfloat16 modulation: each output has the type of what it belongs to."""
    given, dy = inputs(2, 16, 16, device)
    given["modulation"] = given["modulation"].bfloat16()
    (y,), grads = gradients(public, given, [dy])
    (y_ref,), refs = gradients(lambda **k: reference(**k, eps=EPS), given, [dy])
    assert y.dtype == torch.float32 and grads["modulation"].dtype == torch.bfloat16
    assert_close("pixel_modulate", "y", y, y_ref)
    assert_close("pixel_modulate", "dx", grads["x_NPC"], refs["x_NPC"])
    # one unit in the last place of bfloat16: the interpreter truncates where a GPU rounds
    assert relative_error(grads["modulation"], refs["modulation"]) <= 2**-7


def test_registration(device):
    given, dy = inputs(2, 4, 16, device)
    arguments = tuple(t.requires_grad_() for t in given.values())
    torch.library.opcheck(kernels.pixel_modulate, (*arguments, EPS))
    torch.library.opcheck(kernels.pixel_modulate, (*arguments[:2], None, EPS))
    torch.library.opcheck(kernels.pixel_modulate_backward, (dy, *(t.detach() for t in arguments), EPS))


def test_gradient_may_be_a_broadcast(body, device, gradients, assert_close):
    given, _ = inputs(2, 4, 16, device)
    broadcast = torch.ones((), device=device).expand(2, 4, 16)
    _, grads = gradients(public, given, [broadcast])
    _, refs = gradients(lambda **k: reference(**k, eps=EPS), given, [broadcast])
    assert_close("pixel_modulate", "dx", grads["x_NPC"], refs["x_NPC"])


def test_offsets_past_two_to_the_31(addresses):
    """Pixel 2^28 + 3 of 16 channels: modulation element 2^33 + 96."""
    block, pixel, C = 4, 2**28 + 3, 16
    program, M = (pixel // block, 0, 0), pixel + 1
    sizes = {"M": M, "eps": EPS, "C": C, "BLOCK_M": block, "BLOCK_C": C}
    pixels = range(pixel // block * block, M)
    rows = [pixels[0] * C + i for i in range(len(pixels) * C)]
    slots = [pixels[0] * 2 * C + i for i in range(len(pixels) * 2 * C)]
    bf16 = torch.bfloat16
    touched = addresses(fwd_kernel, program, x_ptr=bf16, norm_weight_ptr=bf16, mod_ptr=bf16, y_ptr=bf16, **sizes)
    assert touched["mod_ptr"].tolist() == slots and slots[0] > 2**31
    assert touched["x_ptr"].tolist() == touched["y_ptr"].tolist() == rows
    names = ("dy_ptr", "x_ptr", "norm_weight_ptr", "mod_ptr", "dx_ptr", "dmod_ptr")
    pointers = dict.fromkeys(names, bf16) | {"partial_ptr": torch.float32}
    touched = addresses(pixel_modulate_bwd_kernel, program, **pointers, **sizes, blocks=program[0] + 1, STAGES=1)
    assert touched["dmod_ptr"].tolist() == slots
    assert touched["dx_ptr"].tolist() == touched["dy_ptr"].tolist() == touched["x_ptr"].tolist() == rows
    assert touched["partial_ptr"].tolist() == list(range(program[0] * C, (program[0] + 1) * C))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_NPC": torch.zeros(6, 16)}, r"x must be \[N, P, C\], got \[6, 16\]"),
        ({"norm_weight_C": torch.zeros(8)}, r"norm_weight must be \[16\], got \[8\]"),
        ({"modulation": torch.zeros(2, 3, 16)}, r"modulation must be \[2, 3, 32\], got \[2, 3, 16\]"),
        ({"modulation": torch.zeros(2, 3, 64)[..., ::2]}, "modulation must be contiguous"),
        ({"x_NPC": torch.zeros(2, 3, 16, dtype=torch.int32)}, "x must be float32, bfloat16 or float16"),
    ],
)
def test_bad_input_is_named(change, message, device):
    given, _ = inputs(2, 3, 16, device)
    with pytest.raises(ValueError, match=message):
        public(**(given | {name: moved(tensor, device) for name, tensor in change.items()}))


@pytest.mark.gpu
@pytest.mark.parametrize("C", [8, 16, 32])
def test_bfloat16(C, gradients, assert_close):
    given, dy = inputs(50, 256, C, "cuda", dtype=torch.bfloat16)
    (y,), grads = gradients(public, given, [dy])
    (y_ref,), refs = gradients(lambda **k: reference(**k, eps=EPS), given, [dy], dtype=torch.float64)
    assert_close("pixel_modulate", "y", y, y_ref)
    for name in given:
        assert_close("pixel_modulate", f"d{name}", grads[name], refs[name])
