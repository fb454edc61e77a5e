"""The end of the pixel head and its loss: RMSNorm, projection of every pixel to 3 channels, squared error per image.

    prediction = W (n * norm) + b,   n = x r,   r = 1 / sqrt(mean_C(x^2) + eps)
    loss_i     = weight_i mean_{L, P, 3} (prediction - target)^2          over the pixels of image i

    d  = 2 dloss_i weight_i / (3 L P) (prediction - target)               [N, P, 3], never in memory
    u  = norm * (d W),   dx = r (u - n mean_C(u n))
    S  = sum_pixels d^T n,   dW = S * norm,   dnorm = sum_3 W * S,   db = sum_pixels d

Flow matching with the target of the caller's choice (arXiv 2210.02747; v = x - s e in PixelDiT, arXiv 2511.20645).
Arithmetic is float32 from the stream on. The prediction is not returned: nothing in training reads it, and writing it
would cost a third of what the operator reads; sampling and losses on images use pixel_modulate and a Linear. Sums are
partial sums by blocks of pixels and one reduction, in a fixed order. Three columns are too few for the tensor cores.
Shapes: x [N, P, C] with N = B L; norm [C]; W [3, C]; b [3]; target [N, P, 3]; weight, loss float32 [B].
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from pixelgen_kernels import library
from pixelgen_kernels.launch import Launch, ModelShape


def flow_loss_reference(
    x_NPC: Tensor, norm_C: Tensor, w_3C: Tensor, b_3: Tensor, target_NP3: Tensor, weight_B: Tensor, eps: float
) -> Tensor:
    wide = torch.promote_types(x_NPC.dtype, torch.float32)
    n_NPC = F.rms_norm(x_NPC.to(wide), norm_C.shape, norm_C.to(wide), eps)
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
def _load_head(norm_ptr, w_ptr, b_ptr, k: tl.constexpr, C: tl.constexpr, o_c):
    """Row k of W times norm [1, C] and b_k."""
    norm = tl.load(norm_ptr + o_c, mask=o_c < C, other=0.0).to(tl.float32)
    w = tl.load(w_ptr + k * C + o_c, mask=o_c < C, other=0.0).to(tl.float32)
    return (norm * w)[None, :], tl.load(b_ptr + k).to(tl.float32)


@triton.jit
def _error(x, r, w, b, target_ptr, k: tl.constexpr, o_m, m_m):
    """Channel k of prediction - target [BLOCK_M], 0 past the image."""
    target = tl.load(target_ptr + o_m * 3 + k, mask=m_m, other=0.0).to(tl.float32)
    return tl.where(m_m, tl.sum(x * w, axis=1) * r + b - target, 0.0)


@triton.jit
def flow_loss_fwd_kernel(
    x_ptr, norm_ptr, w_ptr, b_ptr, target_ptr, partial_ptr, pixels, eps,
    C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(pixels, BLOCK_M)
    image, start = tl.program_id(0) // blocks, (tl.program_id(0) % blocks) * BLOCK_M
    first = image.to(tl.int64) * pixels + start
    o_m, o_c = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_C)
    m_m = o_m < pixels - start
    w0, b0 = _load_head(norm_ptr, w_ptr, b_ptr, 0, C, o_c)
    w1, b1 = _load_head(norm_ptr, w_ptr, b_ptr, 1, C, o_c)
    w2, b2 = _load_head(norm_ptr, w_ptr, b_ptr, 2, C, o_c)

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
    factor_ptr, x_ptr, norm_ptr, w_ptr, b_ptr, target_ptr, dx_ptr, partial_ptr, pixels, eps,
    C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    chunks = tl.cdiv(pixels, CHUNK)
    image = tl.program_id(0) // chunks
    o_m, o_c = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_C)
    w0, b0 = _load_head(norm_ptr, w_ptr, b_ptr, 0, C, o_c)
    w1, b1 = _load_head(norm_ptr, w_ptr, b_ptr, 1, C, o_c)
    w2, b2 = _load_head(norm_ptr, w_ptr, b_ptr, 2, C, o_c)
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


def _pixels(x: Tensor, weight: Tensor) -> int:
    """Pixels of an image, L P."""
    return x.shape[0] // max(weight.shape[0], 1) * x.shape[1]


def _fake_forward(x: Tensor, norm: Tensor, w: Tensor, b: Tensor, target: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight.new_empty(weight.shape, dtype=torch.float32)


def _fake_backward(
    dloss: Tensor, x: Tensor, norm: Tensor, w: Tensor, b: Tensor, target: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(norm), torch.empty_like(w), torch.empty_like(b)


def _flops_forward(x: list[int], *_: Any, **__: Any) -> int:
    return 2 * x[0] * x[1] * x[2] * 3


def _flops_backward(dloss: list[int], x: list[int], *_: Any, **__: Any) -> int:
    return 4 * x[0] * x[1] * x[2] * 3


def launch_forward(
    x: Tensor, norm: Tensor, w: Tensor, b: Tensor, target: Tensor, weight: Tensor, eps: float,
    config: Config = CONFIGS[0],
) -> Tensor:  # fmt: skip
    B, C, pixels = weight.shape[0], x.shape[2], _pixels(x, weight)
    partial = x.new_empty((B, triton.cdiv(pixels, config.block_fwd)), dtype=torch.float32)
    flow_loss_fwd_kernel[(partial.numel(),)](
        x, norm, w, b, target, partial, pixels, eps,
        C, config.block_fwd, triton.next_power_of_2(C), num_warps=config.num_warps,
    )  # fmt: skip
    return partial.sum(dim=1) * weight / (3 * pixels)


def launch_backward(
    dloss: Tensor, x: Tensor, norm: Tensor, w: Tensor, b: Tensor, target: Tensor, weight: Tensor, eps: float,
    config: Config = CONFIGS[0],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    B, C, pixels = weight.shape[0], x.shape[2], _pixels(x, weight)
    dx = torch.empty_like(x)
    factor = (dloss * weight * (2 / max(3 * pixels, 1))).float().contiguous()
    partial = x.new_empty((B * triton.cdiv(pixels, config.chunk), 3 * C + 3), dtype=torch.float32)
    flow_loss_bwd_kernel[(partial.shape[0],)](
        factor, x, norm, w, b, target, dx, partial, pixels, eps,
        C, config.block_bwd, triton.next_power_of_2(C), config.chunk, num_warps=config.num_warps,
    )  # fmt: skip
    total = library.sum_partials(partial, torch.float32)
    s = total[: 3 * C].view(3, C)
    return dx, (w * s).sum(dim=0).to(norm.dtype), (norm * s).to(w.dtype), torch.empty_like(b).copy_(total[3 * C :])


@library.operator("flow_loss", _fake_forward, _flops_forward)
def _flow_loss(x: Tensor, norm: Tensor, w: Tensor, b: Tensor, target: Tensor, weight: Tensor, eps: float) -> Tensor:
    return launch_forward(x, norm, w, b, target, weight, eps)


@library.operator("flow_loss_backward", _fake_backward, _flops_backward)
def _flow_loss_backward(
    dloss: Tensor, x: Tensor, norm: Tensor, w: Tensor, b: Tensor, target: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return launch_backward(dloss, x, norm, w, b, target, weight, eps)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
    grads = library.kernels.flow_loss_backward(dloss, *ctx.saved_tensors, ctx.eps)
    return *grads, None, None, None


_flow_loss.register_autograd(_backward, setup_context=_setup_context)


def aot(shape: ModelShape, config: Config = CONFIGS[0]) -> list[Launch]:
    """The launches of the loss of a model, as plain data for the report."""
    M, C, pixels = shape.pixel_rows, shape.channels, shape.tokens * shape.pixels
    kinds = {"target_ptr": "*fp32", "factor_ptr": "*fp32", "partial_ptr": "*fp32", "pixels": "i32", "eps": "fp32"}
    sizes = {"C": C, "BLOCK_C": triton.next_power_of_2(C)}
    launches = []
    for direction, kernel, unit, streams, constexprs in (
        ("fwd", flow_loss_fwd_kernel, config.block_fwd, 1, sizes | {"BLOCK_M": config.block_fwd}),
        ("bwd", flow_loss_bwd_kernel, config.chunk, 2, sizes | {"BLOCK_M": config.block_bwd, "CHUNK": config.chunk}),
    ):
        launches.append(
            Launch(
                name=f"flow_loss_{direction}",
                kernel=kernel,
                signature={n: kinds.get(n, "*bf16") for n in kernel.arg_names if n not in constexprs},
                constexprs=constexprs,
                num_warps=config.num_warps,
                num_stages=3,
                grid=shape.batch * triton.cdiv(pixels, unit),
                flops=0,
                bytes_moved=M * (streams * C * 2 + 3 * 4),
                rows=M,
                loops=() if direction == "fwd" else (config.chunk // config.block_bwd,),
                divisible=("pixels",),
                widest=32,
            )
        )
    return launches


def flow_loss(
    x_NPC: Tensor,
    norm_C: Tensor,
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
    library.check(
        "flow_loss",
        x_NPC,
        x=(x_NPC, (N, P, C)),
        norm=(norm_C, (C,)),
        w=(w_3C, (3, C)),
        b=(b_3, (3,)),
        target=(target_NP3, (N, P, 3)),
        weight=(weight_B, (B,)),
    )
    ops = library.compiled(x_NPC)
    run = flow_loss_reference if ops is None else ops.flow_loss
    return run(x_NPC, norm_C, w_3C, b_3, target_NP3, weight_B, eps)
