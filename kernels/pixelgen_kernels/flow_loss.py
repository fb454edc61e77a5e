"""The end of the pixel head and its loss: RMSNorm, projection of every pixel to 3 channels, squared error per image.

    prediction = W (n * norm_weight) + b,   n = x r,   r = 1 / sqrt(mean_C(x^2) + eps)
    loss_i     = weight_i mean_{L, P, 3} (prediction - target)^2          over the pixels of image i

    d  = 2 dloss_i weight_i / (3 L P) (prediction - target)               [N, P, 3], never in memory
    u  = norm_weight * (d W),   dx = r (u - n mean_C(u n))
    S  = sum_pixels d^T n,   dW = S * norm_weight,   dnorm_weight = sum_3 W * S,   db = sum_pixels d

Flow matching with the target of the caller's choice (arXiv 2210.02747; v = x - s e in PixelDiT, arXiv 2511.20645).
Arithmetic is float32 from the stream on. The prediction is not returned: nothing in training reads it, and writing it
would cost a third of what the operator reads; sampling and losses on images use pixel_modulate and a Linear. Sums are
partial sums by blocks of pixels and one reduction, in a fixed order. Three columns are too few for the tensor cores.
Shapes: x [N, P, C] with N = B L; norm_weight [C]; W [3, C]; b [3]; target [N, P, 3]; weight, loss float32 [B].
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
from pixelgen_kernels.sum_partials import plan_sum, sum_partials
from pixelgen_kernels.tuning import chosen


def flow_loss_reference(
    x_NPC: Tensor, norm_weight_C: Tensor, w_3C: Tensor, b_3: Tensor, target_NP3: Tensor, weight_B: Tensor, eps: float
) -> Tensor:
    wide = torch.promote_types(x_NPC.dtype, torch.float32)
    n_NPC = F.rms_norm(x_NPC.to(wide), norm_weight_C.shape, norm_weight_C.to(wide), eps)
    error_NP3 = F.linear(n_NPC, w_3C.to(wide), b_3.to(wide)) - target_NP3
    B = weight_B.shape[0]
    return weight_B * error_NP3.square().reshape(B, error_NP3.numel() // max(B, 1)).mean(dim=1)


class Config(NamedTuple):
    """A program of forward handles block_fwd pixels, one of backward chunk pixels, block_bwd at a time."""

    block_fwd: int
    block_bwd: int
    chunk: int
    num_warps: int


CONFIGS = (
    Config(256, 64, 1024, 4),
    Config(128, 64, 1024, 4),
    Config(256, 64, 2048, 4),
    Config(128, 64, 512, 4),
    Config(256, 128, 1024, 4),
    Config(512, 128, 2048, 8),
)


@triton.jit
def _load_head(norm_weight_ptr, w_ptr, b_ptr, k: tl.constexpr, C: tl.constexpr, o_c):
    """Row k of W times norm_weight [1, C] and b_k."""
    norm_weight = tl.load(norm_weight_ptr + o_c, mask=o_c < C, other=0.0).to(tl.float32)
    w = tl.load(w_ptr + k * C + o_c, mask=o_c < C, other=0.0).to(tl.float32)
    return (norm_weight * w)[None, :], tl.load(b_ptr + k).to(tl.float32)


@triton.jit
def _error(x, r, w, b, target_ptr, k: tl.constexpr, o_m, m_m):
    """Channel k of prediction - target [BLOCK_M], 0 past the image."""
    target = tl.load(target_ptr + o_m * 3 + k, mask=m_m, other=0.0).to(tl.float32)
    return tl.where(m_m, tl.sum(x * w, axis=1) * r + b - target, 0.0)


@triton.jit
def flow_loss_fwd_kernel(
    x_ptr, norm_weight_ptr, w_ptr, b_ptr, target_ptr, partial_ptr, pixels, eps,
    C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(pixels, BLOCK_M)
    image, start = tl.program_id(0) // blocks, (tl.program_id(0) % blocks) * BLOCK_M
    first = image.to(tl.int64) * pixels + start
    o_m, o_c = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_C)
    m_m = o_m < pixels - start
    w0, b0 = _load_head(norm_weight_ptr, w_ptr, b_ptr, 0, C, o_c)
    w1, b1 = _load_head(norm_weight_ptr, w_ptr, b_ptr, 1, C, o_c)
    w2, b2 = _load_head(norm_weight_ptr, w_ptr, b_ptr, 2, C, o_c)

    mask = m_m[:, None] & (o_c < C)[None, :]
    x = tl.load(x_ptr + first * C + o_m[:, None] * C + o_c[None, :], mask=mask, other=0.0).to(tl.float32)
    r = tl.rsqrt(tl.sum(x * x, axis=1) / C + eps)
    target_ptr += first * 3
    e0 = _error(x, r, w0, b0, target_ptr, 0, o_m, m_m)
    e1 = _error(x, r, w1, b1, target_ptr, 1, o_m, m_m)
    e2 = _error(x, r, w2, b2, target_ptr, 2, o_m, m_m)
    tl.store(partial_ptr + tl.program_id(0), tl.sum(e0 * e0 + e1 * e1 + e2 * e2, axis=0))


@triton.jit
def flow_loss_bwd_kernel(
    factor_ptr, x_ptr, norm_weight_ptr, w_ptr, b_ptr, target_ptr, dx_ptr, partial_ptr, pixels, eps,
    C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    chunks = tl.cdiv(pixels, CHUNK)
    image = tl.program_id(0) // chunks
    o_m, o_c = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_C)
    w0, b0 = _load_head(norm_weight_ptr, w_ptr, b_ptr, 0, C, o_c)
    w1, b1 = _load_head(norm_weight_ptr, w_ptr, b_ptr, 1, C, o_c)
    w2, b2 = _load_head(norm_weight_ptr, w_ptr, b_ptr, 2, C, o_c)
    factor = tl.load(factor_ptr + image)
    s0 = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    s1 = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    s2 = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    db0 = tl.zeros([BLOCK_M], tl.float32)
    db1 = tl.zeros([BLOCK_M], tl.float32)
    db2 = tl.zeros([BLOCK_M], tl.float32)

    for block in tl.range(0, CHUNK // BLOCK_M, num_stages=3):
        start = (tl.program_id(0) % chunks) * CHUNK + block * BLOCK_M
        first = image.to(tl.int64) * pixels + start
        m_m = o_m < pixels - start
        row, mask = first * C + o_m[:, None] * C + o_c[None, :], m_m[:, None] & (o_c < C)[None, :]
        x = tl.load(x_ptr + row, mask=mask, other=0.0).to(tl.float32)
        r = tl.rsqrt(tl.sum(x * x, axis=1) / C + eps)
        d0 = factor * _error(x, r, w0, b0, target_ptr + first * 3, 0, o_m, m_m)
        d1 = factor * _error(x, r, w1, b1, target_ptr + first * 3, 1, o_m, m_m)
        d2 = factor * _error(x, r, w2, b2, target_ptr + first * 3, 2, o_m, m_m)
        n = x * r[:, None]
        u = d0[:, None] * w0 + d1[:, None] * w1 + d2[:, None] * w2
        dx = r[:, None] * (u - n * (tl.sum(u * n, axis=1) / C)[:, None])
        tl.store(dx_ptr + row, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        s0 += d0[:, None] * n
        s1 += d1[:, None] * n
        s2 += d2[:, None] * n
        db0 += d0
        db1 += d1
        db2 += d2

    # partial: S [3, C], db [3]
    partial_ptr += tl.program_id(0).to(tl.int64) * (3 * C + 3)
    tl.store(partial_ptr + o_c, tl.sum(s0, axis=0), mask=o_c < C)
    tl.store(partial_ptr + C + o_c, tl.sum(s1, axis=0), mask=o_c < C)
    tl.store(partial_ptr + 2 * C + o_c, tl.sum(s2, axis=0), mask=o_c < C)
    tl.store(partial_ptr + 3 * C, tl.sum(db0, axis=0))
    tl.store(partial_ptr + 3 * C + 1, tl.sum(db1, axis=0))
    tl.store(partial_ptr + 3 * C + 2, tl.sum(db2, axis=0))


@functools.cache
def plan_forward(B: int, pixels: int, C: int, itemsize: int, config: Config) -> Launch:
    """pixels: of an image."""
    return Launch(
        name="flow_loss_fwd",
        kernel=flow_loss_fwd_kernel,
        grid=B * triton.cdiv(pixels, config.block_fwd),
        constants={"C": C, "BLOCK_M": config.block_fwd, "BLOCK_C": triton.next_power_of_2(C)},
        num_warps=config.num_warps,
        num_stages=3,
        bytes_moved=B * pixels * (C * itemsize + 3 * 4),
        rows=B * pixels,
        widest=32,
    )


@functools.cache
def plan_backward(B: int, pixels: int, C: int, itemsize: int, config: Config) -> tuple[Launch, Launch]:
    """(the pass over pixels, the reduction of its partial sums)."""
    programs = B * triton.cdiv(pixels, config.chunk)
    chunks = Launch(
        name="flow_loss_bwd",
        kernel=flow_loss_bwd_kernel,
        grid=programs,
        constants={
            "C": C, "BLOCK_M": config.block_bwd, "BLOCK_C": triton.next_power_of_2(C), "CHUNK": config.chunk
        },
        num_warps=config.num_warps,
        num_stages=3,
        bytes_moved=B * pixels * (2 * C * itemsize + 3 * 4),
        rows=B * pixels,
        loops=(config.chunk // config.block_bwd,),
        widest=32,
    )  # fmt: skip
    return chunks, plan_sum("flow_loss_bwd_reduce", programs, 3 * C + 3, B * pixels)


def _pixels(x: Tensor, weight: Tensor) -> int:
    """Pixels of an image, L P."""
    return x.shape[0] // max(weight.shape[0], 1) * x.shape[1]


def _fake_forward(
    x: Tensor, norm_weight: Tensor, w: Tensor, b: Tensor, target: Tensor, weight: Tensor, eps: float
) -> Tensor:
    return weight.new_empty(weight.shape, dtype=torch.float32)


def _fake_backward(
    dloss: Tensor, x: Tensor, norm_weight: Tensor, w: Tensor, b: Tensor, target: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(norm_weight), torch.empty_like(w), torch.empty_like(b)


def _flops_forward(x: list[int], *_: Any, **__: Any) -> int:
    return 2 * x[0] * x[1] * x[2] * 3


def _flops_backward(dloss: list[int], x: list[int], *_: Any, **__: Any) -> int:
    return 4 * x[0] * x[1] * x[2] * 3


@operator("flow_loss", _fake_forward, _flops_forward)
def flow_loss_forward(
    x: Tensor, norm_weight: Tensor, w: Tensor, b: Tensor, target: Tensor, weight: Tensor, eps: float
) -> Tensor:
    B, C, pixels = weight.shape[0], x.shape[2], _pixels(x, weight)
    launch = plan_forward(B, pixels, C, x.element_size(), chosen("flow_loss", CONFIGS, C))
    partial = x.new_empty((B, launch.grid // max(B, 1)), dtype=torch.float32)
    launch.start(x, norm_weight, w, b, target, partial, pixels, eps)
    return partial.sum(dim=1) * weight / (3 * pixels)


@operator("flow_loss_backward", _fake_backward, _flops_backward)
def flow_loss_backward(
    dloss: Tensor, x: Tensor, norm_weight: Tensor, w: Tensor, b: Tensor, target: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, C, pixels = weight.shape[0], x.shape[2], _pixels(x, weight)
    dx = torch.empty_like(x)
    factor = (dloss * weight * (2 / max(3 * pixels, 1))).float().contiguous()
    chunks, reduction = plan_backward(B, pixels, C, x.element_size(), chosen("flow_loss", CONFIGS, C))
    partial = x.new_empty((chunks.grid, 3 * C + 3), dtype=torch.float32)
    chunks.start(factor, x, norm_weight, w, b, target, dx, partial, pixels, eps)
    total = sum_partials(reduction, partial, torch.float32)
    s = total[: 3 * C].view(3, C)
    dnorm_weight, dw = (w * s).sum(dim=0).to(norm_weight.dtype), (norm_weight * s).to(w.dtype)
    return dx, dnorm_weight, dw, torch.empty_like(b).copy_(total[3 * C :])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
    return *flow_loss_backward(dloss, *ctx.saved_tensors, ctx.eps), None, None, None


flow_loss_forward.gradient(_save, _backward)


def flow_loss(
    x_NPC: Tensor,
    norm_weight_C: Tensor,
    w_3C: Tensor,
    b_3: Tensor,
    target_NP3: Tensor,
    weight_B: Tensor,
    eps: float = 1e-6,
) -> Tensor:
    """Return the loss of each image, float32 [B]; training takes its mean over the global batch.

    Contiguous tensors, each float32, bfloat16 or float16. target and weight get no gradient. Raises ValueError naming
    what does not fit, also when the N patches are not a whole number of patches for each of the B images.
    """
    if x_NPC.ndim != 3 or weight_B.ndim != 1:
        raise ValueError(
            f"flow_loss: x must be [N, P, C] and weight [B], got {list(x_NPC.shape)}, {list(weight_B.shape)}"
        )
    (N, P, C), B = x_NPC.shape, weight_B.shape[0]
    if N % B if B else N:
        raise ValueError(f"flow_loss: {N} patches are not a whole number of patches for each of {B} images")
    check(
        "flow_loss",
        x_NPC,
        x=(x_NPC, (N, P, C)),
        norm_weight=(norm_weight_C, (C,)),
        w=(w_3C, (3, C)),
        b=(b_3, (3,)),
        target=(target_NP3, (N, P, 3)),
        weight=(weight_B, (B,)),
    )
    arguments = (x_NPC, norm_weight_C, w_3C, b_3, target_NP3, weight_B, eps)
    chosen_body = body(x_NPC)
    if chosen_body == "reference":
        return flow_loss_reference(*arguments)
    return flow_loss_forward.apply(*arguments, body=chosen_body)
