"""SwiGLU: the kernels against the reference and float64, and what a registered operator owes its callers."""

import pytest
import torch
from pixelgen_kernels import library
from pixelgen_kernels import swiglu as public
from pixelgen_kernels.swiglu import CONFIGS, launch_backward, launch_forward, swiglu_bwd_kernel, swiglu_fwd_kernel
from pixelgen_kernels.swiglu import swiglu_reference as reference

# (leading dimensions, F): one row, F smaller than, equal to and just past a block, odd and even, no row at all.
SHAPES = [((1,), 1), ((1, 1), 1024), ((3,), 1025), ((2, 3), 341), ((5, 2, 1), 8), ((0, 4), 8), ((3, 0), 16)]


def inputs(lead, width, device, dtype=torch.float32):
    torch.manual_seed(0)
    packed = 3 * torch.randn(*lead, 2 * width, device=device)
    return packed.to(dtype), torch.randn(*lead, width, device=device).to(dtype)


@pytest.mark.parametrize(("lead", "width"), SHAPES, ids=str)
def test_output_and_gradient(body, lead, width, device, gradients, assert_close):
    packed, dy = inputs(lead, width, device)
    (y,), grads = gradients(public, {"packed": packed}, [dy])
    for rel, dtype in ((1e-5, torch.float32), (1e-6, torch.float64)):
        (y_ref,), refs = gradients(reference, {"packed": packed}, [dy], dtype=dtype)
        assert_close("y", y, y_ref, rel)
        assert_close("dpacked", grads["packed"], refs["packed"], rel)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_configuration_gives_the_same_bits(config, device):
    packed, dy = inputs((5,), 1030, device)
    assert torch.equal(launch_forward(packed, config), launch_forward(packed))
    dpacked, y = launch_backward(dy, packed, config)
    assert torch.equal(dpacked, launch_backward(dy, packed)[0])
    assert torch.equal(y, launch_forward(packed))


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_large_inputs_saturate(body, device):
    packed = torch.tensor([[-1e4, 1e4, 2.0, 2.0]], device=device)
    assert public(packed).tolist() == [[0.0, 2e4]]
    assert launch_backward(torch.ones(1, 2, device=device), packed)[0].tolist() == [[0.0, 2.0, 0.0, 1e4]]


def test_registration(device):
    packed, dy = inputs((2, 3), 8, device)
    torch.library.opcheck(library.kernels.swiglu, (packed.requires_grad_(),))
    torch.library.opcheck(library.kernels.swiglu_backward, (dy, packed.detach()))


def test_compiles_to_one_graph(body, device):
    packed, dy = inputs((2, 3), 8, device)
    compiled = torch.compile(public, fullgraph=True, backend="aot_eager")
    results = []
    for function in (public, compiled):
        leaf = packed.clone().requires_grad_()
        y = function(leaf)
        y.backward(dy)
        results.append((y, leaf.grad))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


def test_gradient_may_be_a_broadcast(body, device):
    packed, _ = inputs((2, 3), 8, device)
    grads = []
    for function in (public, reference):
        leaf = packed.clone().requires_grad_()
        function(leaf).sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads)


def test_offsets_past_two_to_the_31(addresses):
    """Row 2^31 - 2 of width 3072: the first element is number 13194139521024."""
    row, width = 2**31 - 2, 3072
    # program ids are 32-bit: with one block of columns, program 2^30 - 1 of two rows each handles the last rows
    touched = addresses(
        swiglu_fwd_kernel, (row // 2, 0, 0), packed_ptr=torch.bfloat16, y_ptr=torch.bfloat16,
        N=row + 1, F=width, BLOCK_N=2, BLOCK_F=4096,
    )  # fmt: skip
    assert touched["packed_ptr"].tolist() == list(range(row * 2 * width, (row + 1) * 2 * width))
    assert touched["y_ptr"].tolist() == list(range(row * width, (row + 1) * width))
    touched = addresses(
        swiglu_bwd_kernel, (row // 2, 0, 0), dy_ptr=torch.bfloat16, packed_ptr=torch.bfloat16,
        dpacked_ptr=torch.bfloat16, y_ptr=torch.bfloat16, N=row + 1, F=width, BLOCK_N=2, BLOCK_F=4096,
    )  # fmt: skip
    assert touched["dpacked_ptr"].tolist() == list(range(row * 2 * width, (row + 1) * 2 * width))
    assert touched["packed_ptr"].tolist() == touched["dpacked_ptr"].tolist()
    assert touched["dy_ptr"].tolist() == list(range(row * width, (row + 1) * width))
    assert touched["y_ptr"].tolist() == touched["dy_ptr"].tolist()


@pytest.mark.parametrize(
    ("packed", "message"),
    [
        (torch.zeros(2, 7), r"packed must have an even last size \(a \| b\), got \[2, 7\]"),
        (torch.zeros(()), r"packed must have an even last size"),
        (torch.zeros(2, 8, dtype=torch.int32), "packed must be float32, bfloat16 or float16, got torch.int32"),
        (torch.zeros(2, 8, dtype=torch.float64), "only PIXELGEN_OPS=reference takes float64"),
        (torch.zeros(8, 2).t(), r"packed must be contiguous, got \[2, 8\] with strides \(1, 2\)"),
    ],
)
def test_bad_input_is_named(packed, message, device):
    with pytest.raises(ValueError, match=message):
        public(packed.to(device))


@pytest.mark.gpu
def test_bfloat16(gradients, assert_close):
    packed, dy = inputs((64, 33), 3072, "cuda", torch.bfloat16)
    (y,), grads = gradients(public, {"packed": packed}, [dy])
    (y_ref,), refs = gradients(reference, {"packed": packed}, [dy], dtype=torch.float64)
    # one rounding to bfloat16 (2^-9 at most, 2^-9 / sqrt(3) rms)
    assert_close("y", y, y_ref, 2e-3)
    assert_close("dpacked", grads["packed"], refs["packed"], 2e-3)
