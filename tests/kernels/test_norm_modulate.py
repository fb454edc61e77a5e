"""Residual + RMSNorm + modulation: unused outputs, an odd width, large tensors, and what an operator owes."""

import pytest
import torch
from pixelgen_kernels import norm_modulate as public
from pixelgen_kernels.norm_modulate import (
    norm_modulate_bwd_kernel,
    norm_modulate_bwd_reduce_kernel,
    norm_modulate_fwd_kernel,
    norm_modulate_reference,
)
from pixelgen_kernels.registration import kernels

# (B, L, D), whether a branch is pending, outputs that are used: an odd width, so that no row is aligned; no token.
CASES = [((2, 3, 33), True, "both"), ((2, 3, 33), True, "y"), ((2, 3, 33), True, "x'"), ((2, 3, 33), False, "both")]
CASES += [((2, 3, 33), False, "y"), ((2, 0, 32), True, "both")]


def inputs(B, L, D, device, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (B, L, D), "branch": (B, L, D), "weight": (D,), "packed": (B, 6 * D)}
    tensors = {name: torch.randn(*shape, generator=generator).to(device, dtype) for name, shape in shapes.items()}
    cotangents = [torch.randn(B, L, D, generator=generator).to(device, dtype) for _ in range(2)]
    return tensors, cotangents


def from_packed(function):
    """The operator as a model calls it: three of six slices of one packed modulation."""

    def call(x, weight, packed, branch=None, **options):
        _, shift, scale, gate, _, _ = packed.chunk(6, dim=-1)
        return function(x, weight, shift, scale, branch, None if branch is None else gate, **options)

    return call


@pytest.mark.parametrize(("shape", "pending", "used"), CASES, ids=str)
def test_outputs_and_gradients(body, shape, pending, used, device, gradients, assert_close):
    tensors, cotangents = inputs(*shape, device)
    if not pending:
        del tensors["branch"]
    cotangents = [c if used in ("both", name) else None for c, name in zip(cotangents, ("y", "x'"), strict=True)]
    outputs, grads = gradients(from_packed(public), tensors, cotangents)
    refs, ref_grads = gradients(
        from_packed(norm_modulate_reference), tensors, cotangents, dtype=torch.float64, eps=1e-6
    )
    for name, out, ref in zip(("y", "x'"), outputs, refs, strict=True):
        assert_close("norm_modulate", name, out, ref)
    for name, ref in ref_grads.items():
        # autograd leaves out what a result does not depend on, a compiled body then computes its zeros
        zeros = torch.zeros_like(tensors[name])
        pair = (zeros if grad is None else grad for grad in (grads[name], ref))
        assert_close("norm_modulate", f"d{name}", *pair)


def test_eps_enters_where_tokens_vanish(body, device):
    x, one = torch.zeros(1, 1, 8, device=device), torch.ones(8, device=device)
    y, xp = public(x + 3e-3, one, torch.zeros(1, 8, device=device), torch.zeros(1, 8, device=device), eps=16e-6)
    torch.testing.assert_close(y, torch.full_like(y, 3e-3 / 5e-3))
    assert torch.equal(xp, x + 3e-3)


@pytest.mark.parametrize("pending", [True, False], ids=["branch", "no branch"])
def test_registration(pending, device):
    tensors, (dy, dxp) = inputs(2, 3, 16, device)
    shift, scale, gate = tensors["packed"].chunk(6, dim=-1)[:3]
    branch, gate = (tensors["branch"], gate) if pending else (None, None)
    leaves = [t if t is None else t.detach().requires_grad_() for t in (tensors["x"], tensors["weight"], shift, scale)]
    leaves += [t if t is None else t.detach().requires_grad_() for t in (branch, gate)]
    torch.library.opcheck(kernels.norm_modulate, (*leaves, 1e-6))
    r = torch.rand(2, 3, device=device)
    saved = (tensors["x"], r, tensors["weight"], scale, branch, gate)
    torch.library.opcheck(kernels.norm_modulate_backward, (dy, dxp if pending else None, *saved))


def test_offsets_past_two_to_the_31(addresses):
    """Image 2^21 + 1 of 256 tokens of width 1152: element 618475585536 is its first."""
    image, L, D, stride = 2**21 + 1, 256, 1152, 6912
    half, full = torch.bfloat16, torch.float32
    last = {"D": D, "BLOCK_D": 2048, "BLOCK_L": 2}
    row = image * L + 248
    tokens, columns = list(range(row * D, (row + 8) * D)), list(range(image * stride, image * stride + D))
    touched = addresses(
        norm_modulate_fwd_kernel, (image * 32 + 31, 0, 0), x_ptr=half, norm_weight_ptr=half, shift_ptr=half,
        scale_ptr=half, branch_ptr=half, gate_ptr=half, y_ptr=half, xp_ptr=half, r_ptr=full,
        stride_shift=stride, stride_scale=stride, stride_gate=stride, L=L, eps=1e-6, CHUNK=8, **last,
    )  # fmt: skip
    for name in ("x_ptr", "branch_ptr", "y_ptr", "xp_ptr"):
        assert touched[name].tolist() == tokens, name
    for name in ("shift_ptr", "scale_ptr", "gate_ptr"):
        assert touched[name].tolist() == columns, name
    assert touched["r_ptr"].tolist() == list(range(row, row + 8))

    program = image * 32 + 31
    touched = addresses(
        norm_modulate_bwd_kernel, (program, 0, 0), dy_ptr=half, dxp_ptr=half, xp_ptr=half, r_ptr=full,
        norm_weight_ptr=half, scale_ptr=half, branch_ptr=half, gate_ptr=half, dx_ptr=half, dbranch_ptr=half,
        partial_ptr=full, stride_scale=stride, stride_gate=stride, L=L, CHUNK=8, **last,
    )  # fmt: skip
    for name in ("dy_ptr", "dxp_ptr", "xp_ptr", "branch_ptr", "dx_ptr", "dbranch_ptr"):
        assert touched[name].tolist() == tokens, name
    assert touched["partial_ptr"].tolist() == list(range(program * 3 * D, (program + 1) * 3 * D))
    assert touched["r_ptr"].tolist() == list(range(row, row + 8))

    # 60 images of 2^14 chunks: 3.4e9 partial sums
    touched = addresses(
        norm_modulate_bwd_reduce_kernel, (71, 0, 0), partial_ptr=full, norm_weight_ptr=half, scale_ptr=half,
        dnorm_weight_ptr=half, dshift_ptr=half, dscale_ptr=half, dgate_ptr=half, stride_scale=2**27, B=60, chunks=2**4,
        D=1152 * 2**10, BLOCK_D=16, BLOCK_B=64,
    )  # fmt: skip
    width = 1152 * 2**10
    assert touched["partial_ptr"].max() == ((60 * 2**4 - 1) * 3 + 2) * width + 1151
    assert touched["scale_ptr"].max() == 59 * 2**27 + 1151
    assert touched["dgate_ptr"].max() == 59 * width + 1151
    assert min(int(touched[name].min()) for name in touched) == 1136


def arguments(**changed):
    B, L, D = 2, 3, 16
    given = {"x_BLD": (B, L, D), "norm_weight_D": (D,), "shift_BD": (B, D), "scale_BD": (B, D)}
    given |= {"branch_BLD": (B, L, D), "gate_BD": (B, D)}
    return {name: torch.zeros(shape) for name, shape in given.items()} | changed


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x_BLD": torch.zeros(3, 16)}, r"x must be \[B, L, D\], got \[3, 16\]"),
        ({"gate_BD": None}, "branch and gate must be given together"),
        ({"norm_weight_D": torch.zeros(15)}, r"norm_weight must be \[16\], got \[15\]"),
        ({"shift_BD": torch.zeros(3, 16)}, r"shift must be \[2, 16\], got \[3, 16\]"),
        ({"scale_BD": torch.zeros(16, 2).t()}, r"scale must have unit stride .* got strides \(1, 2\)"),
        ({"branch_BLD": torch.zeros(2, 16, 3).mT}, "branch must be contiguous"),
        ({"gate_BD": torch.zeros(2, 16, dtype=torch.int64)}, "gate must be float32, bfloat16 or float16, got .*int64"),
        ({"gate_BD": torch.zeros(2, 16, device="meta")}, "gate must be on cpu, got meta"),
    ],
)
def test_bad_input_is_named(changed, message):
    with pytest.raises(ValueError, match="norm_modulate: " + message):
        public(**arguments(**changed))


@pytest.mark.gpu
@pytest.mark.parametrize("D", [768, 1024, 1152])
def test_bfloat16(D, gradients, assert_close):
    tensors, cotangents = inputs(4, 257, D, "cuda", torch.bfloat16)
    outputs, grads = gradients(from_packed(public), tensors, cotangents)
    refs, ref_grads = gradients(
        from_packed(norm_modulate_reference), tensors, cotangents, dtype=torch.float64, eps=1e-6
    )
    for name, out, ref in zip(("y", "x'"), outputs, refs, strict=True):
        assert_close("norm_modulate", name, out, ref)
    for name, ref in ref_grads.items():
        assert_close("norm_modulate", f"d{name}", grads[name], ref)
