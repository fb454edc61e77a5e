"""RMSNorm over the channels of each pixel and its own modulation.

    y = n * norm_weight * (1 + scale) + shift      (shift | scale) = modulation, both 0 without one
    n = x r,  r = 1 / sqrt(mean_C(x^2) + eps)

    u  = dy * norm_weight * (1 + scale)
    dx = r (u - n mean_C(u n)),   dshift = dy,   dscale = dy * norm_weight * n
    dnorm_weight = sum_pixels dy * (1 + scale) * n

Arithmetic is float32. Backward keeps x and the modulation, writes the modulation's gradient packed as it came, and sums
the weight's over the pixels of a program, then over programs, in a fixed order. PixelDiT (arXiv 2511.20645)
section 3.2, pixel-wise AdaLN.
Shapes: x, y [N, P, C], N = B L patches of P pixels; norm_weight [C]; modulation [N, P, 2 C].
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
from pixelgen_kernels.launch import Launch, multiprocessors
from pixelgen_kernels.registration import operator
from pixelgen_kernels.sum_partials import plan_sum, sum_partials
from pixelgen_kernels.tuning import chosen


def pixel_modulate_reference(x_NPC: Tensor, norm_weight_C: Tensor, modulation: Tensor | None, eps: float) -> Tensor:
    statistics = torch.promote_types(x_NPC.dtype, torch.float32)
    y_NPC = F.rms_norm(x_NPC.to(statistics), norm_weight_C.shape, norm_weight_C.to(statistics), eps)
    if modulation is not None:
        shift_NPC, scale_NPC = modulation.to(statistics).chunk(2, dim=-1)
        y_NPC = y_NPC * (1.0 + scale_NPC) + shift_NPC
    return y_NPC.to(x_NPC.dtype)


class Config(NamedTuple):
    """A program handles block_m pixels; with 16 channels two threads share a pixel, 8 channels (128 bits) each.

    Backward has programs programs on each multiprocessor, which go from block to block and prefetch stages - 1 of them.
    """

    block_m: int
    num_warps: int
    programs: int
    stages: int


CONFIGS = (
    Config(128, 4, 6, 3),
    Config(128, 4, 5, 2),
    Config(128, 4, 5, 4),
    Config(256, 8, 3, 3),
    Config(64, 4, 8, 3),
    Config(256, 4, 2, 3),
)


@triton.jit
def pixel_modulate_fwd_kernel(
    x_ptr, norm_weight_ptr, mod_ptr, y_ptr, M, eps, C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr
):
    first = tl.program_id(0).to(tl.int64) * BLOCK_M
    o_m = tl.arange(0, BLOCK_M)[:, None]
    o_c = tl.arange(0, BLOCK_C)[None, :]
    mask = (o_m < M - first) & (o_c < C)

    weight = tl.load(norm_weight_ptr + o_c, mask=o_c < C, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + first * C + o_m * C + o_c, mask=mask, other=0.0).to(tl.float32)
    y = x * tl.rsqrt(tl.sum(x * x, axis=1) / C + eps)[:, None] * weight
    if mod_ptr is not None:
        mod_ptr += first * (2 * C)
        shift = tl.load(mod_ptr + o_m * (2 * C) + o_c, mask=mask, other=0.0).to(tl.float32)
        scale = tl.load(mod_ptr + o_m * (2 * C) + C + o_c, mask=mask, other=0.0).to(tl.float32)
        y = y * (1.0 + scale) + shift
    tl.store(y_ptr + first * C + o_m * C + o_c, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def pixel_modulate_bwd_kernel(
    dy_ptr, x_ptr, norm_weight_ptr, mod_ptr, dx_ptr, dmod_ptr, partial_ptr, M, blocks, eps,
    C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    o_m = tl.arange(0, BLOCK_M)[:, None]
    o_c = tl.arange(0, BLOCK_C)[None, :]
    weight = tl.load(norm_weight_ptr + o_c, mask=o_c < C, other=0.0).to(tl.float32)
    dweight = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)

    for block in tl.range(tl.program_id(0), blocks, tl.num_programs(0), num_stages=STAGES):
        first = tl.cast(block, tl.int64) * BLOCK_M
        row, slot = first * C + o_m * C + o_c, first * (2 * C) + o_m * (2 * C) + o_c
        mask = (o_m < M - first) & (o_c < C)
        dy = tl.load(dy_ptr + row, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + row, mask=mask, other=0.0).to(tl.float32)
        r = tl.rsqrt(tl.sum(x * x, axis=1) / C + eps)[:, None]
        n = x * r
        dn = dy
        if mod_ptr is not None:
            dn *= 1.0 + tl.load(mod_ptr + slot + C, mask=mask, other=0.0).to(tl.float32)
            tl.store(dmod_ptr + slot, dy.to(dmod_ptr.dtype.element_ty), mask=mask)
            tl.store(dmod_ptr + slot + C, (dy * weight * n).to(dmod_ptr.dtype.element_ty), mask=mask)
        dweight += dn * n
        u = dn * weight
        dx = r * (u - n * (tl.sum(u * n, axis=1) / C)[:, None])
        tl.store(dx_ptr + row, dx.to(dx_ptr.dtype.element_ty), mask=mask)

    o_c = tl.arange(0, BLOCK_C)
    tl.store(partial_ptr + tl.program_id(0) * C + o_c, tl.sum(dweight, axis=0), mask=o_c < C)


@functools.cache
def plan_forward(M: int, C: int, modulated: bool, itemsize: int, config: Config) -> Launch:
    return Launch(
        name="pixel_modulate_fwd",
        kernel=pixel_modulate_fwd_kernel,
        grid=triton.cdiv(M, config.block_m),
        constants={"C": C, "BLOCK_M": config.block_m, "BLOCK_C": triton.next_power_of_2(C)},
        num_warps=config.num_warps,
        num_stages=3,
        bytes_moved=(4 if modulated else 2) * M * C * itemsize,
        rows=M,
    )


@functools.cache
def plan_backward(
    M: int, C: int, modulated: bool, itemsize: int, config: Config, multiprocessors: int
) -> tuple[int, Launch, Launch]:
    """(blocks of pixels, the pass over pixels, the reduction of its partial sums)."""
    blocks = triton.cdiv(M, config.block_m)
    programs = min(blocks, config.programs * multiprocessors)
    pixels = Launch(
        name="pixel_modulate_bwd",
        kernel=pixel_modulate_bwd_kernel,
        grid=programs,
        constants={
            "C": C, "BLOCK_M": config.block_m, "BLOCK_C": triton.next_power_of_2(C), "STAGES": config.stages
        },
        num_warps=config.num_warps,
        num_stages=3,
        # x, dy and dx; of the modulation the scale is read, both parts are written
        bytes_moved=(6 if modulated else 3) * M * C * itemsize,
        rows=M,
        loops=(triton.cdiv(blocks, max(programs, 1)),),
    )  # fmt: skip
    return blocks, pixels, plan_sum("pixel_modulate_bwd_reduce", programs, C, M)


def _fake_forward(x: Tensor, norm_weight: Tensor, modulation: Tensor | None, eps: float) -> Tensor:
    return torch.empty_like(x)


def _fake_backward(
    dy: Tensor, x: Tensor, norm_weight: Tensor, modulation: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    dmodulation = x.new_empty(0) if modulation is None else torch.empty_like(modulation)
    return torch.empty_like(x), torch.empty_like(norm_weight), dmodulation


@operator("pixel_modulate", _fake_forward)
def pixel_modulate_forward(x: Tensor, norm_weight: Tensor, modulation: Tensor | None, eps: float) -> Tensor:
    y = _fake_forward(x, norm_weight, modulation, eps)
    M, C = x.shape[0] * x.shape[1], x.shape[2]
    launch = plan_forward(M, C, modulation is not None, x.element_size(), chosen("pixel_modulate", CONFIGS, C))
    launch.start(x, norm_weight, modulation, y, M, eps)
    return y


@operator("pixel_modulate_backward", _fake_backward)
def pixel_modulate_backward(
    dy: Tensor, x: Tensor, norm_weight: Tensor, modulation: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dmodulation = torch.empty_like(x), None if modulation is None else torch.empty_like(modulation)
    M, C = x.shape[0] * x.shape[1], x.shape[2]
    blocks, pixels, reduction = plan_backward(
        M, C, modulation is not None, x.element_size(), chosen("pixel_modulate", CONFIGS, C), multiprocessors(x.device)
    )
    partial = x.new_empty((pixels.grid, C), dtype=torch.float32)
    pixels.start(dy, x, norm_weight, modulation, dx, dmodulation, partial, M, blocks, eps)
    dnorm_weight = sum_partials(reduction, partial, norm_weight.dtype)
    return dx, dnorm_weight, x.new_empty(0) if dmodulation is None else dmodulation


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, norm_weight, modulation = ctx.saved_tensors
    dx, dnorm_weight, dmodulation = pixel_modulate_backward(dy.contiguous(), x, norm_weight, modulation, ctx.eps)
    return dx, dnorm_weight, None if modulation is None else dmodulation, None


pixel_modulate_forward.gradient(_save, _backward)


def pixel_modulate(x_NPC: Tensor, norm_weight_C: Tensor, modulation: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """Return [N, P, C] in x's dtype.

    Contiguous tensors, each float32, bfloat16 or float16. Raises ValueError naming what does not fit.
    """
    if x_NPC.ndim != 3:
        raise ValueError(f"pixel_modulate: x must be [N, P, C], got {list(x_NPC.shape)}")
    N, P, C = x_NPC.shape
    given = {} if modulation is None else {"modulation": (modulation, (N, P, 2 * C))}
    check("pixel_modulate", x_NPC, x=(x_NPC, x_NPC.shape), norm_weight=(norm_weight_C, (C,)), **given)
    arguments, chosen_body = (x_NPC, norm_weight_C, modulation, eps), body(x_NPC)
    if chosen_body == "reference":
        return pixel_modulate_reference(*arguments)
    return pixel_modulate_forward.apply(*arguments, body=chosen_body)
