"""Per-head RMSNorm of queries and keys and rotary position embedding, straight from the packed projection.

    q' = R n w,  n = q r,  r = 1 / sqrt(mean(q^2) + eps),  R: (a, b) -> (a cos - b sin, a sin + b cos)
         for each pair (a, b) of consecutive features; the same for k, and v passes through
    g  = R^T dq',    dq = r (g w - n mean(g w n)),    dw = sum_{B, L, H} g n

Arithmetic is float32. Backward keeps the packed projection alone and writes its packed gradient, v's part included,
in one pass; sums over tokens are partial sums per chunk of rows and one reduction, in a fixed order.
RoFormer (arXiv 2104.09864) eq. 34; QK-norm (arXiv 2010.04245).
Shapes: qkv [B, L, 3 H d] packed as (q, k, v) x heads x features; weights [d]; cos, sin [L, d / 2]; out [B, L, H, d].
A row is one head of one token.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from einops import rearrange
from torch import Tensor

from pixelgen_kernels.bodies import Body, body
from pixelgen_kernels.checks import check
from pixelgen_kernels.launch import Launch
from pixelgen_kernels.registration import operator
from pixelgen_kernels.sum_partials import plan_sum, sum_partials
from pixelgen_kernels.tuning import chosen


def qk_norm_rope_reference(
    qkv: Tensor, q_norm_weight: Tensor, k_norm_weight: Tensor, cos: Tensor, sin: Tensor, heads: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = rearrange(qkv, "B L (three H d) -> three B L H d", three=3, H=heads)
    return _norm_rotate(q, q_norm_weight, cos, sin, eps), _norm_rotate(k, k_norm_weight, cos, sin, eps), v


def _norm_rotate(x_BLHd: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    statistics = torch.promote_types(x_BLHd.dtype, torch.float32)
    norm = F.rms_norm(x_BLHd.to(statistics), weight.shape, weight.to(statistics), eps)
    return rotate(norm, cos, sin).to(x_BLHd.dtype)


def rotate(x_BLHd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """R x of every head, without a norm: [B, L, H, d] in x's dtype, computed in float32 or wider; cos, sin [L, d / 2].

    In plain PyTorch: for networks that do not norm their queries and keys.
    """
    x = x_BLHd.to(torch.promote_types(x_BLHd.dtype, torch.float32))
    a, b = x[..., 0::2], x[..., 1::2]
    cos, sin = cos[:, None], sin[:, None]
    rotated = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1)
    return rotated.flatten(-2).to(x_BLHd.dtype)


class Config(NamedTuple):
    """Forward, a program handles block_fwd rows of q or of k; backward, chunk_bwd rows of q, k or v, block_bwd at a
    time, which divides it."""

    block_fwd: int
    block_bwd: int
    chunk_bwd: int
    num_warps: int


CONFIGS = (
    Config(32, 16, 256, 4),
    Config(64, 32, 256, 8),
    Config(32, 32, 256, 4),
    Config(16, 8, 256, 2),
    Config(16, 16, 128, 4),
    Config(32, 16, 512, 4),
)


@triton.jit
def _rotate(x, cos, sin, BLOCK_R: tl.constexpr, BLOCK_d: tl.constexpr):
    a, b = tl.split(tl.reshape(x, [BLOCK_R, BLOCK_d // 2, 2]))
    return tl.reshape(tl.join(a * cos - b * sin, a * sin + b * cos), [BLOCK_R, BLOCK_d])


@triton.jit
def _norm_rotate_fwd(x, weight, cos, sin, eps, d: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_d: tl.constexpr):
    x = x.to(tl.float32)
    r = 1.0 / tl.sqrt(tl.sum(x * x, axis=1) / d + eps)
    return _rotate(x * r[:, None] * weight, cos, sin, BLOCK_R, BLOCK_d)


@triton.jit
def _norm_rotate_bwd(dy, x, weight, cos, sin, eps, d: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_d: tl.constexpr):
    """(gradient of x, each row's part of the gradient of weight)."""
    x = x.to(tl.float32)
    r = 1.0 / tl.sqrt(tl.sum(x * x, axis=1) / d + eps)[:, None]
    n = x * r
    g = _rotate(dy.to(tl.float32), cos, -sin, BLOCK_R, BLOCK_d)
    u = g * weight
    return r * (u - n * (tl.sum(u * n, axis=1) / d)[:, None]), g * n


@triton.jit
def qk_norm_rope_fwd_kernel(
    qkv_ptr, q_norm_weight_ptr, k_norm_weight_ptr, cos_ptr, sin_ptr, q_ptr, k_ptr, L, eps,
    H: tl.constexpr, d: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_d: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(L * H, BLOCK_R)
    of_k, block = tl.program_id(0) % 2, tl.program_id(0) // 2
    image = (block // blocks).to(tl.int64)
    first = (block % blocks) * BLOCK_R
    # offsets count from the token that the first row belongs to
    token = first // H
    row = first - token * H + tl.arange(0, BLOCK_R)[:, None]
    o_d, o_p = tl.arange(0, BLOCK_d)[None, :], tl.arange(0, BLOCK_d // 2)[None, :]
    m_r = row < (L - token) * H
    mask, m_p = m_r & (o_d < d), m_r & (o_p < d // 2)
    qkv_ptr += (image * L + token) * (3 * H * d) + of_k * (H * d)
    o_qkv = (row // H) * (2 * H * d) + row * d + o_d
    o_table = (token + row // H) * (d // 2) + o_p
    if of_k == 0:
        weight_ptr, out_ptr = q_norm_weight_ptr, q_ptr
    else:
        weight_ptr, out_ptr = k_norm_weight_ptr, k_ptr

    x = tl.load(qkv_ptr + o_qkv, mask=mask, other=0.0)
    cos = tl.load(cos_ptr + o_table, mask=m_p, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + o_table, mask=m_p, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + o_d, mask=o_d < d, other=0.0).to(tl.float32)
    x = _norm_rotate_fwd(x, weight, cos, sin, eps, d, BLOCK_R, BLOCK_d)
    out_ptr += (image * L + token) * (H * d)
    tl.store(out_ptr + row * d + o_d, x.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def qk_norm_rope_bwd_kernel(
    dq_ptr, dk_ptr, dv_ptr, qkv_ptr, q_norm_weight_ptr, k_norm_weight_ptr, cos_ptr, sin_ptr, dqkv_ptr, partial_ptr,
    L, eps,
    H: tl.constexpr, d: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_d: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    chunks = tl.cdiv(L * H, CHUNK)
    part, chunk = tl.program_id(0) % 3, tl.program_id(0) // 3  # of q, k or v
    image = (chunk // chunks).to(tl.int64)
    first = (chunk % chunks) * CHUNK
    token = first // H
    o_d, o_p = tl.arange(0, BLOCK_d)[None, :], tl.arange(0, BLOCK_d // 2)[None, :]
    out = (image * L + token) * (H * d)
    packed = (image * L + token) * (3 * H * d) + part * (H * d)
    rows = tl.minimum(CHUNK, L * H - first)
    if part == 0:
        dy_ptr, weight_ptr = dq_ptr, q_norm_weight_ptr
    elif part == 1:
        dy_ptr, weight_ptr = dk_ptr, k_norm_weight_ptr
    else:
        dy_ptr, weight_ptr = dv_ptr, k_norm_weight_ptr

    if part == 2:
        for r in range(0, rows, BLOCK_R):
            row = first - token * H + r + tl.arange(0, BLOCK_R)[:, None]
            mask = (row < (L - token) * H) & (o_d < d)
            dv = tl.load(dy_ptr + out + row * d + o_d, mask=mask, other=0.0)
            tl.store(dqkv_ptr + packed + (row // H) * (2 * H * d) + row * d + o_d, dv, mask=mask)
    else:
        weight = tl.load(weight_ptr + o_d, mask=o_d < d, other=0.0).to(tl.float32)
        # rows are summed by the lanes that hold them, and over lanes once at the end
        sums = tl.zeros([BLOCK_R, BLOCK_d], tl.float32)
        for r in range(0, rows, BLOCK_R):
            row = first - token * H + r + tl.arange(0, BLOCK_R)[:, None]
            m_r = row < (L - token) * H
            mask, m_p = m_r & (o_d < d), m_r & (o_p < d // 2)
            o_qkv = packed + (row // H) * (2 * H * d) + row * d + o_d
            o_table = (token + row // H) * (d // 2) + o_p
            dy = tl.load(dy_ptr + out + row * d + o_d, mask=mask, other=0.0)
            x = tl.load(qkv_ptr + o_qkv, mask=mask, other=0.0)
            cos = tl.load(cos_ptr + o_table, mask=m_p, other=0.0).to(tl.float32)
            sin = tl.load(sin_ptr + o_table, mask=m_p, other=0.0).to(tl.float32)
            dx, of_weight = _norm_rotate_bwd(dy, x, weight, cos, sin, eps, d, BLOCK_R, BLOCK_d)
            sums += of_weight
            tl.store(dqkv_ptr + o_qkv, dx.to(dqkv_ptr.dtype.element_ty), mask=mask)
        o_sum = tl.arange(0, BLOCK_d)
        partial_ptr += chunk.to(tl.int64) * (2 * d) + part * d
        tl.store(partial_ptr + o_sum, tl.sum(sums, axis=0), mask=o_sum < d)


@functools.cache
def plan_forward(B: int, L: int, H: int, d: int, itemsize: int, config: Config) -> Launch:
    return Launch(
        name="qk_norm_rope_fwd",
        kernel=qk_norm_rope_fwd_kernel,
        grid=2 * B * triton.cdiv(L * H, config.block_fwd),
        constants={"H": H, "d": d, "BLOCK_R": config.block_fwd, "BLOCK_d": triton.next_power_of_2(d)},
        num_warps=config.num_warps,
        num_stages=1,
        bytes_moved=4 * B * L * H * d * itemsize,
        rows=B * L,
    )


@functools.cache
def plan_backward(B: int, L: int, H: int, d: int, itemsize: int, config: Config) -> tuple[Launch, Launch]:
    """(the pass over rows, the reduction of its partial sums)."""
    chunks = B * triton.cdiv(L * H, config.chunk_bwd)
    rows = Launch(
        name="qk_norm_rope_bwd",
        kernel=qk_norm_rope_bwd_kernel,
        grid=3 * chunks,
        constants={
            "H": H, "d": d, "BLOCK_R": config.block_bwd, "BLOCK_d": triton.next_power_of_2(d), "CHUNK": config.chunk_bwd
        },
        num_warps=config.num_warps,
        num_stages=1,
        bytes_moved=8 * B * L * H * d * itemsize + chunks * 2 * d * 4,
        rows=B * L,
        loops=(config.chunk_bwd // config.block_bwd,),
    )  # fmt: skip
    return rows, plan_sum("qk_norm_rope_bwd_reduce", chunks, 2 * d, B * L)


def _fake_forward(
    qkv: Tensor, q_norm_weight: Tensor, k_norm_weight: Tensor, cos: Tensor, sin: Tensor, heads: int, eps: float
) -> tuple[Tensor, Tensor]:
    shape = (*qkv.shape[:2], heads, q_norm_weight.shape[0])
    return qkv.new_empty(shape), qkv.new_empty(shape)


def _fake_backward(
    dq: Tensor, dk: Tensor, dv: Tensor, qkv: Tensor, q_norm_weight: Tensor, k_norm_weight: Tensor, cos: Tensor,
    sin: Tensor, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return torch.empty_like(qkv), q_norm_weight.new_empty(2, q_norm_weight.shape[0])


@operator("qk_norm_rope", _fake_forward)
def qk_norm_rope_forward(
    qkv: Tensor, q_norm_weight: Tensor, k_norm_weight: Tensor, cos: Tensor, sin: Tensor, heads: int, eps: float
) -> tuple[Tensor, Tensor]:
    q, k = _fake_forward(qkv, q_norm_weight, k_norm_weight, cos, sin, heads, eps)
    B, L, H, d = q.shape
    launch = plan_forward(B, L, H, d, q.element_size(), chosen("qk_norm_rope", CONFIGS, H, d))
    launch.start(qkv, q_norm_weight, k_norm_weight, cos, sin, q, k, L, eps)
    return q, k


@operator("qk_norm_rope_backward", _fake_backward)
def qk_norm_rope_backward(
    dq: Tensor, dk: Tensor, dv: Tensor, qkv: Tensor, q_norm_weight: Tensor, k_norm_weight: Tensor, cos: Tensor,
    sin: Tensor, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(gradient of qkv, gradients of the two weights as [2, d])."""
    B, L, H, d = dq.shape
    dqkv = torch.empty_like(qkv)
    rows, reduction = plan_backward(B, L, H, d, dq.element_size(), chosen("qk_norm_rope", CONFIGS, H, d))
    partial = qkv.new_empty((rows.grid // 3, 2, d), dtype=torch.float32)
    rows.start(dq, dk, dv, qkv, q_norm_weight, k_norm_weight, cos, sin, dqkv, partial, L, eps)
    return dqkv, sum_partials(reduction, partial, q_norm_weight.dtype)


class _QKNormRope(torch.autograd.Function):
    """The operator with v beside q and k. A registered operator may not return a view of its input; this function
    may, so that v costs nothing forward and its gradient goes straight into the packed one backward."""

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, q_norm_weight: Tensor, k_norm_weight: Tensor, cos: Tensor, sin: Tensor, heads: int,
        eps: float, body: Body,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        ctx.save_for_backward(qkv, q_norm_weight, k_norm_weight, cos, sin)
        ctx.eps, ctx.body = eps, body
        q, k = qk_norm_rope_forward(qkv, q_norm_weight, k_norm_weight, cos, sin, heads, eps, body=body)
        return q, k, qkv.view(*qkv.shape[:2], 3, *q.shape[2:])[:, :, 2]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dqkv, dweights = qk_norm_rope_backward(
            *(grad.contiguous() for grad in grads), *ctx.saved_tensors, ctx.eps, body=ctx.body
        )
        return dqkv, dweights[0], dweights[1], None, None, None, None, None


def qk_norm_rope(
    qkv: Tensor, q_norm_weight: Tensor, k_norm_weight: Tensor, cos: Tensor, sin: Tensor, heads: int, eps: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k, v, each [B, L, H, d] in qkv's dtype; v is a view of qkv, to be read only.

    qkv: contiguous [B, L, 3 H d]; weights [d], d even; cos, sin [L, d / 2], constants. float32, bfloat16 or float16;
    the two weights share a dtype, as do the two tables. Raises ValueError naming what does not fit.
    """
    if qkv.ndim != 3 or heads < 1 or qkv.shape[-1] % (6 * heads):
        raise ValueError(f"qk_norm_rope: qkv must be [B, L, 3 * {heads} heads * an even d], got {list(qkv.shape)}")
    _, L, width = qkv.shape
    d = width // (3 * heads)
    check(
        "qk_norm_rope", qkv, qkv=(qkv, qkv.shape), q_norm_weight=(q_norm_weight, (d,)),
        k_norm_weight=(k_norm_weight, (d,)), cos=(cos, (L, d // 2)), sin=(sin, (L, d // 2)),
    )  # fmt: skip
    if q_norm_weight.dtype != k_norm_weight.dtype or cos.dtype != sin.dtype:
        raise ValueError(
            "qk_norm_rope: q_norm_weight and k_norm_weight must share a dtype, and so must cos and sin, "
            f"got {q_norm_weight.dtype}, {k_norm_weight.dtype}, {cos.dtype}, {sin.dtype}"
        )
    arguments = (qkv, q_norm_weight, k_norm_weight, cos, sin, heads, eps)
    chosen_body = body(qkv)
    if chosen_body == "reference":
        return qk_norm_rope_reference(*arguments)
    return _QKNormRope.apply(*arguments, chosen_body)
