"""Partial results of programs, summed in a fixed order: what a backward kernel uses where others use atomics.

    out[c] = sum_r partials[r, c]        float32, R rows of C columns; a program owns BLOCK_C columns

Few columns a program, so that many programs share a narrow sum.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from pixelgen_kernels.launch import Launch

BLOCK_R, BLOCK_C, NUM_WARPS = 256, 16, 8


@triton.jit
def sum_partials_kernel(
    partial_ptr, out_ptr, R, C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    o_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for r in range(0, R, BLOCK_R):
        o_r = (r + tl.arange(0, BLOCK_R)).to(tl.int64)
        mask = (o_r < R)[:, None] & (o_c < C)[None, :]
        total += tl.load(partial_ptr + o_r[:, None] * C + o_c[None, :], mask=mask, other=0.0)
    tl.store(out_ptr + o_c, tl.sum(total, axis=0).to(out_ptr.dtype.element_ty), mask=o_c < C)


def plan_sum(name: str, programs: int, columns: int, rows: int) -> Launch:
    """The launch that sums [programs, columns], for the plan of an operator. rows: as in Launch."""
    return Launch(
        name=name,
        kernel=sum_partials_kernel,
        grid=triton.cdiv(columns, BLOCK_C),
        constants={"C": columns, "BLOCK_R": BLOCK_R, "BLOCK_C": BLOCK_C},
        num_warps=NUM_WARPS,
        num_stages=1,
        bytes_moved=programs * columns * 4,
        rows=rows,
        loops=(triton.cdiv(programs, BLOCK_R),),
        widest=8 * math.gcd(4 * columns, 16),
    )


def sum_partials(launch: Launch, partials: Tensor, dtype: torch.dtype) -> Tensor:
    """Start the planned sum of float32 partial results [programs, ...] over their first dimension: [...] in dtype."""
    out = partials.new_empty(partials.shape[1:], dtype=dtype)
    launch.start(partials, out, partials.shape[0])
    return out
