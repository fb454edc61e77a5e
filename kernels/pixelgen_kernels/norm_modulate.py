"""Residual, RMSNorm and adaptive modulation of the token stream, in one operator.

    x' = x + gate * branch                                  (when a branch is pending)
    y  = n * norm_weight * (1 + scale) + shift                   n = x' r,  r = 1 / sqrt(mean(x'^2) + eps)

    u       = dy * norm_weight * (1 + scale)
    dx      = dx' + r (u - n mean(u n)),    dbranch = dx * gate,    dgate = sum_L dx * branch
    dshift  = sum_L dy,    dscale = norm_weight * sum_L dy n,    dnorm_weight = sum_B (1 + scale) sum_L dy n

Arithmetic is float32. Sums over tokens are partial sums per (image, chunk of tokens) and one reduction, in a fixed
order. Backward keeps x', branch and r. PixelDiT (arXiv 2511.20645) section 3; AdaLN from DiT (arXiv 2212.09748)
section 3.2. Shapes: x, x', branch, y [B, L, D]; norm_weight [D]; shift, scale, gate [B, D], any row stride; r [B, L].
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from pixelgen_kernels.bodies import body
from pixelgen_kernels.checks import check
from pixelgen_kernels.launch import Launch
from pixelgen_kernels.registration import operator
from pixelgen_kernels.tuning import chosen


def norm_modulate_reference(
    x_BLD: Tensor,
    norm_weight_D: Tensor,
    shift_BD: Tensor,
    scale_BD: Tensor,
    branch_BLD: Tensor | None,
    gate_BD: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    if branch_BLD is not None:
        x_BLD = (x_BLD + gate_BD[:, None] * branch_BLD).to(x_BLD.dtype)
    statistics = torch.promote_types(x_BLD.dtype, torch.float32)
    norm_BLD = F.rms_norm(x_BLD.to(statistics), norm_weight_D.shape, norm_weight_D.to(statistics), eps)
    y_BLD = norm_BLD * (1.0 + scale_BD[:, None]) + shift_BD[:, None]
    return y_BLD.to(x_BLD.dtype), x_BLD


class Config(NamedTuple):
    """A program handles `chunk` tokens of one image, block_l at a time, which divides it. A row is spread over the
    program's threads, eight columns each."""

    block_l: int
    chunk_fwd: int
    chunk_bwd: int


CONFIGS = (Config(2, 8, 32), Config(2, 16, 64), Config(4, 8, 32), Config(4, 16, 64), Config(1, 4, 32), Config(1, 8, 16))
# Columns by images of one step of the reduction of partial sums.
REDUCE_BLOCK_D, REDUCE_BLOCK_B, REDUCE_WARPS = 16, 64, 4


@triton.jit
def norm_modulate_fwd_kernel(
    x_ptr, norm_weight_ptr, shift_ptr, scale_ptr, branch_ptr, gate_ptr, y_ptr, xp_ptr, r_ptr,
    stride_shift, stride_scale, stride_gate, L, eps,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_L: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    chunks = tl.cdiv(L, CHUNK)
    image = (tl.program_id(0) // chunks).to(tl.int64)
    first = (tl.program_id(0) % chunks) * CHUNK
    row = image * L + first
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D

    weight = tl.load(norm_weight_ptr + o_d, mask=m_d, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr + image * stride_scale + o_d, mask=m_d, other=0.0).to(tl.float32)
    shift = tl.load(shift_ptr + image * stride_shift + o_d, mask=m_d, other=0.0).to(tl.float32)
    weight *= 1.0 + scale
    if branch_ptr is not None:
        gate = tl.load(gate_ptr + image * stride_gate + o_d, mask=m_d, other=0.0).to(tl.float32)

    for l in range(0, tl.minimum(CHUNK, L - first), BLOCK_L):
        o_l = l + tl.arange(0, BLOCK_L)
        m_l = o_l < L - first
        offset = o_l[:, None] * D + o_d[None, :]
        mask = m_l[:, None] & m_d[None, :]
        x = tl.load(x_ptr + row * D + offset, mask=mask, other=0.0)
        if branch_ptr is not None:
            branch = tl.load(branch_ptr + row * D + offset, mask=mask, other=0.0).to(tl.float32)
            # y is that of x' as stored, so that backward, which reads x', differentiates the same function
            x = (x.to(tl.float32) + gate[None, :] * branch).to(xp_ptr.dtype.element_ty)
            tl.store(xp_ptr + row * D + offset, x, mask=mask)
        x = x.to(tl.float32)
        r = 1.0 / tl.sqrt(tl.sum(x * x, axis=1) / D + eps)
        tl.store(r_ptr + row + o_l, r, mask=m_l)
        y = x * r[:, None] * weight[None, :] + shift[None, :]
        tl.store(y_ptr + row * D + offset, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def norm_modulate_bwd_kernel(
    dy_ptr, dxp_ptr, xp_ptr, r_ptr, norm_weight_ptr, scale_ptr, branch_ptr, gate_ptr, dx_ptr, dbranch_ptr, partial_ptr,
    stride_scale, stride_gate, L,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_L: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    chunks = tl.cdiv(L, CHUNK)
    image = (tl.program_id(0) // chunks).to(tl.int64)
    first = (tl.program_id(0) % chunks) * CHUNK
    row = image * L + first
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D

    weight = tl.load(norm_weight_ptr + o_d, mask=m_d, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr + image * stride_scale + o_d, mask=m_d, other=0.0).to(tl.float32)
    weight *= 1.0 + scale
    sum_dy = tl.zeros([BLOCK_D], tl.float32)
    sum_dyn = tl.zeros([BLOCK_D], tl.float32)
    if branch_ptr is not None:
        gate = tl.load(gate_ptr + image * stride_gate + o_d, mask=m_d, other=0.0).to(tl.float32)
        sum_gate = tl.zeros([BLOCK_D], tl.float32)

    for l in range(0, tl.minimum(CHUNK, L - first), BLOCK_L):
        o_l = l + tl.arange(0, BLOCK_L)
        m_l = o_l < L - first
        offset = o_l[:, None] * D + o_d[None, :]
        mask = m_l[:, None] & m_d[None, :]
        dy = tl.load(dy_ptr + row * D + offset, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(xp_ptr + row * D + offset, mask=mask, other=0.0).to(tl.float32)
        if dxp_ptr is not None:
            dx = tl.load(dxp_ptr + row * D + offset, mask=mask, other=0.0).to(tl.float32)
        else:
            dx = tl.zeros([BLOCK_L, BLOCK_D], tl.float32)
        if branch_ptr is not None:
            branch = tl.load(branch_ptr + row * D + offset, mask=mask, other=0.0).to(tl.float32)
        r = tl.load(r_ptr + row + o_l, mask=m_l, other=0.0)[:, None]

        n = x * r
        sum_dy += tl.sum(dy, axis=0)
        sum_dyn += tl.sum(dy * n, axis=0)
        u = dy * weight[None, :]
        dx += r * (u - n * (tl.sum(u * n, axis=1) / D)[:, None])
        tl.store(dx_ptr + row * D + offset, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if branch_ptr is not None:
            sum_gate += tl.sum(dx * branch, axis=0)
            dbranch = (dx * gate[None, :]).to(dbranch_ptr.dtype.element_ty)
            tl.store(dbranch_ptr + row * D + offset, dbranch, mask=mask)

    partial_ptr += tl.program_id(0).to(tl.int64) * (3 * D)
    tl.store(partial_ptr + o_d, sum_dy, mask=m_d)
    tl.store(partial_ptr + D + o_d, sum_dyn, mask=m_d)
    if branch_ptr is not None:
        tl.store(partial_ptr + 2 * D + o_d, sum_gate, mask=m_d)


@triton.jit
def norm_modulate_bwd_reduce_kernel(
    partial_ptr, norm_weight_ptr, scale_ptr, dnorm_weight_ptr, dshift_ptr, dscale_ptr, dgate_ptr,
    stride_scale, B, chunks,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """partial [B, chunks, 3, D] -> dshift, dscale, dgate [B, D], dnorm_weight [D]; a program owns BLOCK_D columns."""
    o_d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    m_d = o_d < D
    weight = tl.load(norm_weight_ptr + o_d, mask=m_d, other=0.0).to(tl.float32)
    dweight = tl.zeros([BLOCK_B, BLOCK_D], tl.float32)
    for b in range(0, B, BLOCK_B):
        o_b = (b + tl.arange(0, BLOCK_B)[:, None]).to(tl.int64)
        mask = (o_b < B) & m_d
        sum_dy = tl.zeros([BLOCK_B, BLOCK_D], tl.float32)
        sum_dyn = tl.zeros([BLOCK_B, BLOCK_D], tl.float32)
        sum_gate = tl.zeros([BLOCK_B, BLOCK_D], tl.float32)
        for c in tl.range(0, chunks, loop_unroll_factor=4):
            offset = (o_b * chunks + c) * (3 * D) + o_d
            sum_dy += tl.load(partial_ptr + offset, mask=mask, other=0.0)
            sum_dyn += tl.load(partial_ptr + D + offset, mask=mask, other=0.0)
            if dgate_ptr is not None:
                sum_gate += tl.load(partial_ptr + 2 * D + offset, mask=mask, other=0.0)
        scale = tl.load(scale_ptr + o_b * stride_scale + o_d, mask=mask, other=0.0).to(tl.float32)
        dweight += (1.0 + scale) * sum_dyn
        offset = o_b * D + o_d
        tl.store(dshift_ptr + offset, sum_dy.to(dshift_ptr.dtype.element_ty), mask=mask)
        tl.store(dscale_ptr + offset, (weight * sum_dyn).to(dscale_ptr.dtype.element_ty), mask=mask)
        if dgate_ptr is not None:
            tl.store(dgate_ptr + offset, sum_gate.to(dgate_ptr.dtype.element_ty), mask=mask)
    dweight = tl.sum(dweight, axis=0)[None, :].to(dnorm_weight_ptr.dtype.element_ty)
    tl.store(dnorm_weight_ptr + o_d, dweight, mask=m_d)


def _row_block(D: int) -> tuple[int, int]:
    """(BLOCK_D, num_warps) for rows of D: a power of two of columns, eight (128 bits of bfloat16) for each thread."""
    block = max(triton.next_power_of_2(D), 16)
    return block, min(max(block // 256, 1), 16)


@functools.cache
def plan_forward(B: int, L: int, D: int, pending: bool, itemsize: int, config: Config) -> Launch:
    """pending: whether a branch is added first."""
    block_d, num_warps = _row_block(D)
    return Launch(
        name="norm_modulate_fwd",
        kernel=norm_modulate_fwd_kernel,
        grid=B * triton.cdiv(L, config.chunk_fwd),
        constants={"D": D, "BLOCK_D": block_d, "BLOCK_L": config.block_l, "CHUNK": config.chunk_fwd},
        num_warps=num_warps,
        num_stages=1,
        # x and y, and with a branch the branch and x'; the row's statistics; shift, scale and gate
        bytes_moved=itemsize * B * L * D * (4 if pending else 2) + 4 * B * L + itemsize * B * D * (3 if pending else 2),
        rows=B * L,
        loops=(config.chunk_fwd // config.block_l,),
    )


@functools.cache
def plan_backward(
    B: int, L: int, D: int, pending: bool, flowing: bool, itemsize: int, config: Config
) -> tuple[int, Launch, Launch]:
    """(chunks of an image, the pass over tokens, the reduction of its partial sums).

    pending: whether a branch was added. flowing: whether x' has a gradient of its own.
    """
    block_d, num_warps = _row_block(D)
    chunks = triton.cdiv(L, config.chunk_bwd)
    partials, streams = B * chunks * 3 * D * 4, 3 + flowing + 2 * pending
    rows = Launch(
        name="norm_modulate_bwd",
        kernel=norm_modulate_bwd_kernel,
        grid=B * chunks,
        constants={"D": D, "BLOCK_D": block_d, "BLOCK_L": config.block_l, "CHUNK": config.chunk_bwd},
        num_warps=num_warps,
        num_stages=1,
        bytes_moved=itemsize * B * L * D * streams + 4 * B * L + partials * (3 if pending else 2) // 3,
        rows=B * L,
        loops=(config.chunk_bwd // config.block_l,),
    )
    reduction = Launch(
        name="norm_modulate_bwd_reduce",
        kernel=norm_modulate_bwd_reduce_kernel,
        grid=triton.cdiv(D, REDUCE_BLOCK_D),
        constants={"D": D, "BLOCK_D": REDUCE_BLOCK_D, "BLOCK_B": REDUCE_BLOCK_B},
        num_warps=REDUCE_WARPS,
        num_stages=1,
        bytes_moved=partials * (3 if pending else 2) // 3 + itemsize * B * D * (4 if pending else 3),
        rows=B * L,
        loops=(triton.cdiv(B, REDUCE_BLOCK_B), chunks),
    )
    return chunks, rows, reduction


def _fake_forward(
    x: Tensor, norm_weight: Tensor, shift: Tensor, scale: Tensor, branch: Tensor | None, gate: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    # x' is x where no branch is pending, and an operator may not return its input: an empty tensor stands for it
    xp = x.new_empty(0) if branch is None else torch.empty_like(x)
    return torch.empty_like(x), xp, x.new_empty(x.shape[:2], dtype=torch.float32)


def _fake_backward(
    dy: Tensor, dxp: Tensor | None, xp: Tensor, r: Tensor, norm_weight: Tensor, scale: Tensor, branch: Tensor | None,
    gate: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    B, _, D = xp.shape
    absent = branch is None
    return (
        torch.empty_like(xp),
        xp.new_empty(0) if absent else torch.empty_like(branch),
        torch.empty_like(norm_weight),
        scale.new_empty(B, D),
        scale.new_empty(B, D),
        scale.new_empty(0) if absent else scale.new_empty(B, D),
    )


@operator("norm_modulate", _fake_forward)
def norm_modulate_forward(
    x: Tensor, norm_weight: Tensor, shift: Tensor, scale: Tensor, branch: Tensor | None, gate: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, x', r)."""
    y, xp, r = _fake_forward(x, norm_weight, shift, scale, branch, gate, eps)
    B, L, D = x.shape
    launch = plan_forward(B, L, D, branch is not None, x.element_size(), chosen("norm_modulate", CONFIGS, D))
    launch.start(
        x, norm_weight, shift, scale, branch, gate, y, xp, r,
        shift.stride(0), scale.stride(0), 0 if gate is None else gate.stride(0), L, eps,
    )  # fmt: skip
    return y, xp, r


@operator("norm_modulate_backward", _fake_backward)
def norm_modulate_backward(
    dy: Tensor, dxp: Tensor | None, xp: Tensor, r: Tensor, norm_weight: Tensor, scale: Tensor, branch: Tensor | None,
    gate: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    grads = _fake_backward(dy, dxp, xp, r, norm_weight, scale, branch, gate)
    dx, dbranch, dnorm_weight, dshift, dscale, dgate = grads
    B, L, D = xp.shape
    config = chosen("norm_modulate", CONFIGS, D)
    chunks, rows, reduction = plan_backward(B, L, D, branch is not None, dxp is not None, xp.element_size(), config)
    partial = xp.new_empty((B, chunks, 3, D), dtype=torch.float32)
    rows.start(
        dy, dxp, xp, r, norm_weight, scale, branch, gate, dx, dbranch, partial,
        scale.stride(0), 0 if gate is None else gate.stride(0), L,
    )  # fmt: skip
    reduction.start(
        partial, norm_weight, scale, dnorm_weight, dshift, dscale, None if gate is None else dgate,
        scale.stride(0), B, chunks,
    )  # fmt: skip
    return grads


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, norm_weight, _, scale, branch, gate, _ = inputs
    _, xp, r = output
    ctx.save_for_backward(x if branch is None else xp, r, norm_weight, scale, branch, gate)
    # an absent gradient of x' must not cost a tensor of zeros
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor | None, dxp: Tensor | None, dr: Tensor | None) -> tuple[Tensor | None, ...]:
    xp, r, norm_weight, scale, branch, gate = ctx.saved_tensors
    dy = torch.zeros_like(xp) if dy is None else dy.contiguous()
    dxp = None if dxp is None or branch is None else dxp.contiguous()
    dx, dbranch, dnorm_weight, dshift, dscale, dgate = norm_modulate_backward(
        dy, dxp, xp, r, norm_weight, scale, branch, gate
    )
    if branch is None:
        return dx, dnorm_weight, dshift, dscale, None, None, None
    return dx, dnorm_weight, dshift, dscale, dbranch, dgate, None


norm_modulate_forward.gradient(_save, _backward)


def norm_modulate(
    x_BLD: Tensor,
    norm_weight_D: Tensor,
    shift_BD: Tensor,
    scale_BD: Tensor,
    branch_BLD: Tensor | None = None,
    gate_BD: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Return (y, x'), both [B, L, D] in x's dtype. branch and gate are given together or not at all.

    x, branch and norm_weight are contiguous, float32, bfloat16 or float16; shift, scale and gate may be slices of one
    packed [B, 6 D] tensor. Raises ValueError naming what does not fit.
    """
    if x_BLD.ndim != 3:
        raise ValueError(f"norm_modulate: x must be [B, L, D], got {list(x_BLD.shape)}")
    if (branch_BLD is None) != (gate_BD is None):
        raise ValueError("norm_modulate: branch and gate must be given together, got only one of them")
    B, L, D = x_BLD.shape
    wanted = {"x": (x_BLD, (B, L, D)), "norm_weight": (norm_weight_D, (D,))}
    wanted |= {"shift": (shift_BD, (B, D)), "scale": (scale_BD, (B, D))}
    if branch_BLD is not None:
        wanted |= {"branch": (branch_BLD, (B, L, D)), "gate": (gate_BD, (B, D))}
    check("norm_modulate", x_BLD, rows=("shift", "scale", "gate"), **wanted)
    arguments = (x_BLD, norm_weight_D, shift_BD, scale_BD, branch_BLD, gate_BD, eps)
    chosen_body = body(x_BLD)
    if chosen_body == "reference":
        return norm_modulate_reference(*arguments)
    y_BLD, xp_BLD, _ = norm_modulate_forward.apply(*arguments, body=chosen_body)
    return y_BLD, x_BLD if branch_BLD is None else xp_BLD
