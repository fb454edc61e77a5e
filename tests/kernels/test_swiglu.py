"""SwiGLU: any leading dimensions, saturation, large tensors, and what an operator owes its callers."""

import pytest
import torch
from pixelgen_kernels import swiglu as public
from pixelgen_kernels import tuning
from pixelgen_kernels.registration import kernels
from pixelgen_kernels.swiglu import CONFIGS, swiglu_backward, swiglu_bwd_kernel, swiglu_forward, swiglu_fwd_kernel
from pixelgen_kernels.swiglu import swiglu_reference as reference


def inputs(lead, width, device, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    packed = 3 * torch.randn(*lead, 2 * width, generator=generator)
    return packed.to(device, dtype), torch.randn(*lead, width, generator=generator).to(device, dtype)


@pytest.mark.parametrize(("lead", "width"), [((1,), 1), ((5, 2, 1), 8), ((3, 0), 16)], ids=str)
def test_any_leading_dimensions(body, lead, width, device, gradients, assert_close):
    packed, dy = inputs(lead, width, device)
    (y,), grads = gradients(public, {"packed": packed}, [dy])
    (y_ref,), refs = gradients(reference, {"packed": packed}, [dy], dtype=torch.float64)
    assert_close("swiglu", "y", y, y_ref)
    assert_close("swiglu", "dpacked", grads["packed"], refs["packed"])


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_configuration_gives_the_same_bits(config, device):
    packed, dy = inputs((5,), 1030, device)
    with tuning.using("swiglu", config):
        y, (dpacked, y_again) = swiglu_forward(packed), swiglu_backward(dy, packed)
    assert torch.equal(y, swiglu_forward(packed)) and torch.equal(y, y_again)
    assert torch.equal(dpacked, swiglu_backward(dy, packed)[0])


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_large_inputs_saturate(body, device):
    packed = torch.tensor([[-1e4, 1e4, 2.0, 2.0]], device=device)
    assert public(packed).tolist() == [[0.0, 2e4]]
    assert swiglu_backward(torch.ones(1, 2, device=device), packed)[0].tolist() == [[0.0, 2.0, 0.0, 1e4]]


def test_registration(device):
    packed, dy = inputs((2, 3), 8, device)
    torch.library.opcheck(kernels.swiglu, (packed.requires_grad_(),))
    torch.library.opcheck(kernels.swiglu_backward, (dy, packed.detach()))


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
def test_bad_input_is_named(packed, message, device, monkeypatch):
    monkeypatch.setenv("PIXELGEN_OPS", "triton")
    with pytest.raises(ValueError, match=message):
        public(packed.to(device))


@pytest.mark.gpu
def test_bfloat16(gradients, assert_close):
    packed, dy = inputs((64, 33), 3072, "cuda", torch.bfloat16)
    (y,), grads = gradients(public, {"packed": packed}, [dy])
    (y_ref,), refs = gradients(reference, {"packed": packed}, [dy], dtype=torch.float64)
    assert_close("swiglu", "y", y, y_ref)
    assert_close("swiglu", "dpacked", grads["packed"], refs["packed"])
