"""Pixel-wise modulated RMSNorm: the kernels against the reference and float64, and what an operator owes."""

import pytest
import torch
from pixelgen_kernels import library
from pixelgen_kernels import pixel_modulate as public
from pixelgen_kernels.pixel_modulate import CONFIGS, launch_backward, launch_forward, pixel_modulate_bwd_kernel
from pixelgen_kernels.pixel_modulate import pixel_modulate_fwd_kernel as fwd_kernel
from pixelgen_kernels.pixel_modulate import pixel_modulate_reference as reference

EPS = 1e-6
# (N, P, C): one patch of one pixel, p = 4, 8, 16, odd counts, a channel count that is no power of two, no patch at all.
SHAPES = [(1, 1, 16), (3, 16, 8), (5, 64, 16), (1, 256, 32), (7, 9, 24), (0, 16, 16)]


def inputs(N, P, C, device, modulated=True, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=generator).to(device, dtype)

    found = {"x_NPC": 2 * randn(N, P, C), "weight_C": 1 + 0.3 * randn(C)}
    if modulated:
        found["modulation"] = 0.5 * randn(N, P, 2 * C)
    return found, randn(N, P, C)


def compare(shape, modulated, device, gradients, assert_close):
    given, dy = inputs(*shape, device, modulated)
    (y,), grads = gradients(public, given, [dy])
    for rel, dtype in ((1e-5, torch.float32), (1e-6, torch.float64)):
        full = {"modulation": None, "eps": EPS}
        (y_ref,), refs = gradients(lambda **k: reference(**(full | k)), given, [dy], dtype=dtype)  # noqa: B023
        assert_close("y", y, y_ref, rel)
        for name in given:
            assert_close(f"d{name}", grads[name], refs[name], rel)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_and_gradients(body, shape, device, gradients, assert_close):
    compare(shape, True, device, gradients, assert_close)


def test_without_modulation(body, device, gradients, assert_close):
    compare((3, 64, 16), False, device, gradients, assert_close)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_configuration_agrees_and_repeats(config, device, assert_close):
    given, dy = inputs(6, 509, 16, device)
    arguments = (*given.values(), EPS)
    assert torch.equal(launch_forward(*arguments, config), launch_forward(*arguments))
    first, again = (launch_backward(dy, *arguments, config) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for name, a, b in zip(("dx", "dweight", "dmodulation"), first, launch_backward(dy, *arguments), strict=True):
        assert_close(name, a, b, 1e-6)


def test_streams_may_differ_in_type(body, device, gradients, assert_close):
    """A float32 pixel stream between bfloat16 modulation: each output has the type of what it belongs to."""
    given, dy = inputs(2, 16, 16, device)
    given["modulation"] = given["modulation"].bfloat16()
    (y,), grads = gradients(public, given, [dy])
    (y_ref,), refs = gradients(lambda **k: reference(**k, eps=EPS), given, [dy])
    assert y.dtype == torch.float32 and grads["modulation"].dtype == torch.bfloat16
    assert_close("y", y, y_ref)
    assert_close("dx", grads["x_NPC"], refs["x_NPC"])
    # one unit in the last place of bfloat16: the interpreter truncates where a GPU rounds
    assert_close("dmodulation", grads["modulation"], refs["modulation"], 2**-7)


def test_registration(device):
    given, dy = inputs(2, 4, 16, device)
    arguments = tuple(t.requires_grad_() for t in given.values())
    torch.library.opcheck(library.kernels.pixel_modulate, (*arguments, EPS))
    torch.library.opcheck(library.kernels.pixel_modulate, (*arguments[:2], None, EPS))
    torch.library.opcheck(library.kernels.pixel_modulate_backward, (dy, *(t.detach() for t in arguments), EPS))


def test_compiles_to_one_graph(body, device, gradients):
    given, dy = inputs(2, 4, 16, device)
    compiled = torch.compile(public, fullgraph=True, backend="aot_eager")
    (y,), grads = gradients(public, given, [dy])
    (y_compiled,), grads_compiled = gradients(compiled, given, [dy])
    assert torch.equal(y, y_compiled)
    assert all(torch.equal(grads[name], grads_compiled[name]) for name in grads)


def test_gradient_may_be_a_broadcast(body, device, gradients, assert_close):
    given, _ = inputs(2, 4, 16, device)
    broadcast = torch.ones((), device=device).expand(2, 4, 16)
    _, grads = gradients(public, given, [broadcast])
    _, refs = gradients(lambda **k: reference(**k, eps=EPS), given, [broadcast])
    assert_close("dx", grads["x_NPC"], refs["x_NPC"])


def test_offsets_past_two_to_the_31(addresses):
    """Pixel 2^28 + 3 of 16 channels: modulation element 2^33 + 96."""
    block, pixel, C = 4, 2**28 + 3, 16
    program, M = (pixel // block, 0, 0), pixel + 1
    sizes = {"M": M, "eps": EPS, "C": C, "BLOCK_M": block, "BLOCK_C": C}
    pixels = range(pixel // block * block, M)
    rows = [pixels[0] * C + i for i in range(len(pixels) * C)]
    slots = [pixels[0] * 2 * C + i for i in range(len(pixels) * 2 * C)]
    bf16 = torch.bfloat16
    touched = addresses(fwd_kernel, program, x_ptr=bf16, weight_ptr=bf16, mod_ptr=bf16, y_ptr=bf16, **sizes)
    assert touched["mod_ptr"].tolist() == slots and slots[0] > 2**31
    assert touched["x_ptr"].tolist() == touched["y_ptr"].tolist() == rows
    names = ("dy_ptr", "x_ptr", "weight_ptr", "mod_ptr", "dx_ptr", "dmod_ptr")
    pointers = dict.fromkeys(names, bf16) | {"partial_ptr": torch.float32}
    touched = addresses(pixel_modulate_bwd_kernel, program, **pointers, **sizes, blocks=program[0] + 1, STAGES=1)
    assert touched["dmod_ptr"].tolist() == slots
    assert touched["dx_ptr"].tolist() == touched["dy_ptr"].tolist() == touched["x_ptr"].tolist() == rows
    assert touched["partial_ptr"].tolist() == list(range(program[0] * C, (program[0] + 1) * C))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_NPC": torch.zeros(6, 16)}, r"x must be \[N, P, C\], got \[6, 16\]"),
        ({"weight_C": torch.zeros(8)}, r"weight must be \[16\], got \[8\]"),
        ({"modulation": torch.zeros(2, 3, 16)}, r"modulation must be \[2, 3, 32\], got \[2, 3, 16\]"),
        ({"modulation": torch.zeros(2, 3, 64)[..., ::2]}, "modulation must be contiguous"),
        ({"x_NPC": torch.zeros(2, 3, 16, dtype=torch.int32)}, "x must be float32, bfloat16 or float16"),
    ],
)
def test_bad_input_is_named(change, message, device):
    given, _ = inputs(2, 3, 16, device)
    with pytest.raises(ValueError, match=message):
        public(**(given | {name: tensor.to(device) for name, tensor in change.items()}))


@pytest.mark.gpu
@pytest.mark.parametrize("C", [8, 16, 32])
def test_bfloat16(C, gradients, assert_close):
    given, dy = inputs(50, 256, C, "cuda", dtype=torch.bfloat16)
    (y,), grads = gradients(public, given, [dy])
    (y_ref,), refs = gradients(lambda **k: reference(**k, eps=EPS), given, [dy], dtype=torch.float64)
    assert_close("y", y, y_ref, 2e-3)
    for name in given:
        assert_close(f"d{name}", grads[name], refs[name], 2e-3)
