"""Gated linear unit with SiLU, from a packed projection.

    y  = silu(a) * b,  (a | b) = packed                     silu(a) = a s,  s = 1 / (1 + exp(-a))
    da = dy * b * s * (1 + a (1 - s)),   db = dy * a * s

"GLU Variants Improve Transformer" (arXiv 2002.05202) eq. 6. Arithmetic is float32; backward keeps `packed` alone and
writes the packed gradient, and y again for who needs it, in one pass.
Shapes: packed [..., 2 F]; y [..., F]; N rows in all.
"""

from __future__ import annotations

import functools
import math
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


def swiglu_reference(packed: Tensor) -> Tensor:
    a, b = packed.chunk(2, dim=-1)
    return F.silu(a) * b


class Config(NamedTuple):
    """A program handles block_n rows by block_f columns of a and of b."""

    block_n: int
    block_f: int
    num_warps: int


CONFIGS = (
    Config(2, 1024, 4),
    Config(1, 1024, 4),
    Config(4, 1024, 4),
    Config(2, 512, 2),
    Config(4, 512, 4),
    Config(1, 2048, 8),
)


@triton.jit
def swiglu_fwd_kernel(packed_ptr, y_ptr, N, F: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr):
    # F is a constant of the compilation, so that the compiler sees how rows are aligned and picks the widest access.
    blocks: tl.constexpr = (F + BLOCK_F - 1) // BLOCK_F
    row = (tl.program_id(0) // blocks) * BLOCK_N
    packed_ptr += row.to(tl.int64) * (2 * F)
    y_ptr += row.to(tl.int64) * F
    o_n = tl.arange(0, BLOCK_N)[:, None]
    o_f = (tl.program_id(0) % blocks) * BLOCK_F + tl.arange(0, BLOCK_F)[None, :]
    mask = (o_n < N - row) & (o_f < F)

    a = tl.load(packed_ptr + o_n * (2 * F) + o_f, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(packed_ptr + o_n * (2 * F) + F + o_f, mask=mask, other=0.0).to(tl.float32)
    y = a * tl.sigmoid(a) * b
    tl.store(y_ptr + o_n * F + o_f, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def swiglu_bwd_kernel(
    dy_ptr, packed_ptr, dpacked_ptr, y_ptr, N, F: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr
):
    blocks: tl.constexpr = (F + BLOCK_F - 1) // BLOCK_F
    row = (tl.program_id(0) // blocks) * BLOCK_N
    packed_ptr += row.to(tl.int64) * (2 * F)
    dpacked_ptr += row.to(tl.int64) * (2 * F)
    dy_ptr += row.to(tl.int64) * F
    y_ptr += row.to(tl.int64) * F
    o_n = tl.arange(0, BLOCK_N)[:, None]
    o_f = (tl.program_id(0) % blocks) * BLOCK_F + tl.arange(0, BLOCK_F)[None, :]
    mask = (o_n < N - row) & (o_f < F)

    a = tl.load(packed_ptr + o_n * (2 * F) + o_f, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(packed_ptr + o_n * (2 * F) + F + o_f, mask=mask, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + o_n * F + o_f, mask=mask, other=0.0).to(tl.float32)
    s = tl.sigmoid(a)
    da = dy * b * s * (1.0 + a * (1.0 - s))
    db = dy * a * s
    tl.store(dpacked_ptr + o_n * (2 * F) + o_f, da.to(dpacked_ptr.dtype.element_ty), mask=mask)
    tl.store(dpacked_ptr + o_n * (2 * F) + F + o_f, db.to(dpacked_ptr.dtype.element_ty), mask=mask)
    tl.store(y_ptr + o_n * F + o_f, (a * s * b).to(y_ptr.dtype.element_ty), mask=mask)


@functools.cache
def plan(direction: str, N: int, F: int, itemsize: int, config: Config) -> Launch:
    """The launch of N rows of F. direction: "fwd" or "bwd"."""
    return Launch(
        name=f"swiglu_{direction}",
        kernel=swiglu_fwd_kernel if direction == "fwd" else swiglu_bwd_kernel,
        grid=triton.cdiv(N, config.block_n) * triton.cdiv(F, config.block_f),
        constants={"F": F, "BLOCK_N": config.block_n, "BLOCK_F": config.block_f},
        num_warps=config.num_warps,
        num_stages=1,
        bytes_moved=(3 if direction == "fwd" else 6) * N * F * itemsize,
        rows=N,
        widest=8 * math.gcd(F * itemsize, 16),
    )


def _fake_forward(packed: Tensor) -> Tensor:
    return packed.new_empty((*packed.shape[:-1], packed.shape[-1] // 2))


def _fake_backward(dy: Tensor, packed: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(packed), torch.empty_like(dy)


@operator("swiglu", _fake_forward)
def swiglu_forward(packed: Tensor) -> Tensor:
    y = _fake_forward(packed)
    N, F = math.prod(y.shape[:-1]), y.shape[-1]
    plan("fwd", N, F, y.element_size(), chosen("swiglu", CONFIGS, F)).start(packed, y, N)
    return y


@operator("swiglu_backward", _fake_backward)
def swiglu_backward(dy: Tensor, packed: Tensor) -> tuple[Tensor, Tensor]:
    """(dpacked, y): the output comes again at the price of its writing, for the layer that did not keep it."""
    dpacked, y = _fake_backward(dy, packed)
    N, F = math.prod(dy.shape[:-1]), dy.shape[-1]
    plan("bwd", N, F, y.element_size(), chosen("swiglu", CONFIGS, F)).start(dy, packed, dpacked, y, N)
    return dpacked, y


def _save(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dy: Tensor) -> Tensor:
    return swiglu_backward(dy.contiguous(), *ctx.saved_tensors)[0]


swiglu_forward.gradient(_save, _backward)


def swiglu(packed: Tensor) -> Tensor:
    """Return silu(first half) * second half, [..., F] in packed's dtype.

    packed: contiguous [..., 2 F], float32, bfloat16 or float16. Raises ValueError naming what does not fit.
    """
    if packed.ndim == 0 or packed.shape[-1] % 2:
        raise ValueError(f"swiglu: packed must have an even last size (a | b), got {list(packed.shape)}")
    check("swiglu", packed, packed=(packed, packed.shape))
    chosen_body = body(packed)
    return swiglu_reference(packed) if chosen_body == "reference" else swiglu_forward.apply(packed, body=chosen_body)
