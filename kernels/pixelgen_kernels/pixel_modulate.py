"""RMSNorm over the channels of each pixel and its own modulation.

    y = n * weight * (1 + scale) + shift      (shift | scale) = modulation, both 0 without one
    n = x r,  r = 1 / sqrt(mean_C(x^2) + eps)

    u  = dy * weight * (1 + scale)
    dx = r (u - n mean_C(u n)),   dshift = dy,   dscale = dy * weight * n,   dweight = sum_pixels dy * (1 + scale) * n

Arithmetic is float32. Backward keeps x and the modulation, writes the modulation's gradient packed as it came, and sums
the weight's over the pixels of a program, then over programs, in a fixed order. PixelDiT (arXiv 2511.20645)
section 3.2, pixel-wise AdaLN. Shapes: x, y [N, P, C], N = B L patches of P pixels; weight [C]; modulation [N, P, 2 C].
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from pixelgen_kernels import library
from pixelgen_kernels.device import H100
from pixelgen_kernels.launch import Launch, ModelShape


def pixel_modulate_reference(x_NPC: Tensor, weight_C: Tensor, modulation: Tensor | None, eps: float) -> Tensor:
    statistics = torch.promote_types(x_NPC.dtype, torch.float32)
    y_NPC = F.rms_norm(x_NPC.to(statistics), weight_C.shape, weight_C.to(statistics), eps)
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
    x_ptr, weight_ptr, mod_ptr, y_ptr, M, eps, C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr
):
    first = tl.program_id(0).to(tl.int64) * BLOCK_M
    o_m = tl.arange(0, BLOCK_M)[:, None]
    o_c = tl.arange(0, BLOCK_C)[None, :]
    mask = (o_m < M - first) & (o_c < C)

    weight = tl.load(weight_ptr + o_c, mask=o_c < C, other=0.0).to(tl.float32)
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
    dy_ptr, x_ptr, weight_ptr, mod_ptr, dx_ptr, dmod_ptr, partial_ptr, M, blocks, eps,
    C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    o_m = tl.arange(0, BLOCK_M)[:, None]
    o_c = tl.arange(0, BLOCK_C)[None, :]
    weight = tl.load(weight_ptr + o_c, mask=o_c < C, other=0.0).to(tl.float32)
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


def _fake_forward(x: Tensor, weight: Tensor, modulation: Tensor | None, eps: float) -> Tensor:
    return torch.empty_like(x)


def _fake_backward(
    dy: Tensor, x: Tensor, weight: Tensor, modulation: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    dmodulation = x.new_empty(0) if modulation is None else torch.empty_like(modulation)
    return torch.empty_like(x), torch.empty_like(weight), dmodulation


def launch_forward(
    x: Tensor, weight: Tensor, modulation: Tensor | None, eps: float, config: Config = CONFIGS[0]
) -> Tensor:
    y = _fake_forward(x, weight, modulation, eps)
    M, C = x.shape[0] * x.shape[1], x.shape[2]
    pixel_modulate_fwd_kernel[(triton.cdiv(M, config.block_m),)](
        x, weight, modulation, y, M, eps, C, config.block_m, triton.next_power_of_2(C), num_warps=config.num_warps
    )
    return y


def launch_backward(
    dy: Tensor, x: Tensor, weight: Tensor, modulation: Tensor | None, eps: float, config: Config = CONFIGS[0]
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dmodulation = torch.empty_like(x), None if modulation is None else torch.empty_like(modulation)
    M, C = x.shape[0] * x.shape[1], x.shape[2]
    blocks = triton.cdiv(M, config.block_m)
    programs = min(blocks, config.programs * library.multiprocessors(x.device))
    partial = x.new_empty((programs, C), dtype=torch.float32)
    pixel_modulate_bwd_kernel[(programs,)](
        dy, x, weight, modulation, dx, dmodulation, partial, M, blocks, eps,
        C, config.block_m, triton.next_power_of_2(C), config.stages, num_warps=config.num_warps,
    )  # fmt: skip
    return dx, library.sum_partials(partial, weight.dtype), x.new_empty(0) if dmodulation is None else dmodulation


@library.operator("pixel_modulate", _fake_forward)
def _pixel_modulate(x: Tensor, weight: Tensor, modulation: Tensor | None, eps: float) -> Tensor:
    return launch_forward(x, weight, modulation, eps)


@library.operator("pixel_modulate_backward", _fake_backward)
def _pixel_modulate_backward(
    dy: Tensor, x: Tensor, weight: Tensor, modulation: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return launch_backward(dy, x, weight, modulation, eps)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, modulation, ctx.eps = inputs
    ctx.save_for_backward(x, weight, modulation)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, modulation = ctx.saved_tensors
    dx, dweight, dmodulation = library.kernels.pixel_modulate_backward(dy.contiguous(), x, weight, modulation, ctx.eps)
    return dx, dweight, None if modulation is None else dmodulation, None


_pixel_modulate.register_autograd(_backward, setup_context=_setup_context)


def aot(shape: ModelShape, config: Config = CONFIGS[0]) -> list[Launch]:
    """The launches of one modulated norm of a model, as plain data for the report."""
    M, C = shape.pixel_rows, shape.channels
    blocks = triton.cdiv(M, config.block_m)
    programs = min(blocks, config.programs * H100.sms)
    kinds = {"partial_ptr": "*fp32", "M": "i32", "blocks": "i32", "eps": "fp32"}
    sizes = {"C": C, "BLOCK_M": config.block_m, "BLOCK_C": triton.next_power_of_2(C)}

    def launch(name: str, kernel: Any, constexprs: dict[str, int], grid: int, streams: int, **fields: Any) -> Launch:
        return Launch(
            name=f"pixel_modulate_{name}",
            kernel=kernel,
            signature={n: kinds.get(n, "*bf16") for n in kernel.arg_names if n not in constexprs},
            constexprs=constexprs,
            num_warps=config.num_warps,
            num_stages=3,
            grid=grid,
            flops=0,
            bytes_moved=streams * M * C * 2,
            rows=M,
            divisible=("M",),
            **fields,
        )

    return [
        launch("fwd", pixel_modulate_fwd_kernel, sizes, blocks, 4),
        launch(
            "bwd", pixel_modulate_bwd_kernel, sizes | {"STAGES": config.stages}, programs, 6,
            loops=(triton.cdiv(blocks, programs),),
        ),
        library.sum_partials_launch("pixel_modulate_bwd_reduce", programs, C, M),
    ]  # fmt: skip


def pixel_modulate(x_NPC: Tensor, weight_C: Tensor, modulation: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """Return [N, P, C] in x's dtype.

    Contiguous tensors, each float32, bfloat16 or float16. Raises ValueError naming what does not fit.
    """
    if x_NPC.ndim != 3:
        raise ValueError(f"pixel_modulate: x must be [N, P, C], got {list(x_NPC.shape)}")
    N, P, C = x_NPC.shape
    given = {} if modulation is None else {"modulation": (modulation, (N, P, 2 * C))}
    library.check("pixel_modulate", x_NPC, x=(x_NPC, x_NPC.shape), weight=(weight_C, (C,)), **given)
    ops = library.compiled(x_NPC)
    if ops is None:
        return pixel_modulate_reference(x_NPC, weight_C, modulation, eps)
    return ops.pixel_modulate(x_NPC, weight_C, modulation, eps)
