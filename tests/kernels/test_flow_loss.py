"""Final norm, projection and flow-matching loss: its definition in plain arithmetic, and what an operator owes."""

import numpy as np
import pytest
import torch
from pixelgen_kernels import bodies
from pixelgen_kernels.flow_loss import flow_loss as public
from pixelgen_kernels.flow_loss import flow_loss_bwd_kernel, flow_loss_fwd_kernel
from pixelgen_kernels.flow_loss import flow_loss_reference as reference
from pixelgen_kernels.registration import kernels

EPS = 1e-6


def inputs(B, L, P, C, device, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)

    def randn(*shape, kind=dtype):
        return torch.randn(*shape, generator=generator).to(device, kind)

    learned = {
        "x_NPC": 2 * randn(B * L, P, C),
        "norm_weight_C": 1 + 0.3 * randn(C),
        "w_3C": randn(3, C) / C**0.5,
        "b_3": 0.5 * randn(3),
    }
    given = {"target_NP3": randn(B * L, P, 3, kind=torch.float32), "weight_B": 1 + randn(B, kind=torch.float32).abs()}
    return learned, given, randn(B, kind=torch.float32)


def test_the_definition_in_numpy(body, device, assert_close):
    learned, given, _ = inputs(2, 3, 4, 16, device)
    x, norm_weight, w, b, target, weight = (t.double().cpu().numpy() for t in (learned | given).values())
    n = x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS) * norm_weight
    error = ((n @ w.T + b - target) ** 2).reshape(2, -1)
    assert_close("flow_loss", "loss", public(**learned, **given), torch.from_numpy(weight * error.mean(1)))


def test_registration(device):
    learned, given, dloss = inputs(2, 1, 4, 16, device)
    arguments = (*(t.requires_grad_() for t in learned.values()), *given.values())
    torch.library.opcheck(kernels.flow_loss, (*arguments, EPS))
    torch.library.opcheck(kernels.flow_loss_backward, (dloss, *(t.detach() for t in arguments), EPS))


def test_gradient_may_be_a_broadcast(body, device, gradients, assert_close):
    learned, given, _ = inputs(2, 1, 4, 16, device)
    for function in (torch.mean, torch.sum):
        found = []
        for body in (public, lambda **k: reference(**k, eps=EPS)):
            leaf = learned["x_NPC"].clone().requires_grad_()
            function(body(**(learned | {"x_NPC": leaf}), **given)).backward()
            found.append(leaf.grad)
        assert_close("flow_loss", "dx", *found)


def test_offsets_past_two_to_the_31(addresses):
    """The last pixels of image 2^14 - 1 of 2^18 + 5 pixels of 16 channels: element 2^36 and more."""
    block, image, pixels, C = 16, 2**14 - 1, 2**18 + 5, 16
    last = image * pixels + pixels // block * block
    rows = list(range(last * C, (image + 1) * pixels * C))
    target = list(range(last * 3, (image + 1) * pixels * 3))
    assert rows[0] > 2**31
    program = image * -(-pixels // block) + pixels // block
    names = ("x_ptr", "norm_weight_ptr", "w_ptr", "b_ptr", "target_ptr", "partial_ptr")
    pointers = dict.fromkeys(names, torch.float32)
    sizes = {"pixels": pixels, "eps": EPS, "C": C, "BLOCK_M": block, "BLOCK_C": C}
    touched = addresses(flow_loss_fwd_kernel, (program, 0, 0), **pointers, **sizes)
    assert touched["x_ptr"].tolist() == rows and touched["target_ptr"].tolist() == target
    pointers |= {"factor_ptr": torch.float32, "dx_ptr": torch.float32}
    touched = addresses(flow_loss_bwd_kernel, (program, 0, 0), **pointers, **sizes, CHUNK=block)
    assert touched["x_ptr"].tolist() == touched["dx_ptr"].tolist() == rows
    assert touched["target_ptr"].tolist() == target and touched["factor_ptr"].tolist() == [image]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_NPC": torch.zeros(6, 16)}, r"x must be \[N, P, C\] and weight \[B\], got \[6, 16\], \[2\]"),
        ({"weight_B": torch.ones(4)}, "6 patches are not a whole number of patches for each of 4 images"),
        ({"w_3C": torch.zeros(16, 3)}, r"w must be \[3, 16\], got \[16, 3\]"),
        ({"target_NP3": torch.zeros(6, 3, 4).transpose(1, 2)}, "target must be contiguous"),
        ({"b_3": torch.zeros(3, dtype=torch.int64)}, "b must be float32, bfloat16 or float16, got torch.int64"),
    ],
)
def test_bad_input_is_named(change, message, device):
    learned, given, _ = inputs(2, 3, 4, 16, device)
    with pytest.raises(ValueError, match=message):
        public(**(learned | given | {name: tensor.to(device) for name, tensor in change.items()}))


def test_the_reference_takes_float64(device, monkeypatch):
    monkeypatch.setenv(bodies.VARIABLE, "reference")
    learned, given, _ = inputs(2, 3, 4, 16, device)
    assert public(**{name: tensor.double() for name, tensor in (learned | given).items()}).dtype == torch.float64


@pytest.mark.gpu
@pytest.mark.parametrize("C", [8, 16, 32])
def test_bfloat16(C, gradients, assert_close):
    """The stream's gradient is rounded to bfloat16; the loss and the sums are float32."""
    learned, given, dloss = inputs(3, 16, 256, C, "cuda", torch.bfloat16)
    (loss,), grads = gradients(lambda **k: public(**k, **given), learned, [dloss])
    assert loss.dtype == torch.float32
    given = {name: tensor.double() for name, tensor in given.items()}
    (ref,), refs = gradients(lambda **k: reference(**k, **given, eps=EPS), learned, [dloss], dtype=torch.float64)
    assert_close("flow_loss", "loss", loss, ref)
    for name in learned:
        assert_close("flow_loss", f"d{name}", grads[name], refs[name])
