"""Operators with one planted fault each, judged for sm_90 by test_report in a process without the interpreter."""

from __future__ import annotations

import os
import sys
from dataclasses import replace

import torch
import triton
import triton.language as tl
from pixelgen_kernels.launch import Launch
from pixelgen_kernels.registry import Inputs, Maker, Operator
from pixelgen_kernels.report.command import main
from pixelgen_kernels.shapes import MODELS, B, ModelShape
from torch import Tensor

N = 1 << 20


@triton.jit
def copy_kernel(x_ptr, y_ptr, N, BLOCK: tl.constexpr, WORK: tl.constexpr):
    offset = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offset, mask=offset < N)
    for _ in tl.static_range(WORK):
        x = tl.exp(x)
    tl.store(y_ptr + offset, x, mask=offset < N)


@triton.jit
def strided_kernel(x_ptr, y_ptr, stride, BLOCK: tl.constexpr):
    offset = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + offset * stride, tl.load(x_ptr + offset * stride))


@triton.jit
def product_kernel(a_ptr, b_ptr, y_ptr, K, M: tl.constexpr, N: tl.constexpr, BLOCK_K: tl.constexpr):
    o_m, o_n, o_k = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :], tl.arange(0, BLOCK_K)
    acc = tl.zeros((M, N), tl.float32)
    a_ptr += tl.program_id(0) * M * K
    for k in range(0, K, BLOCK_K):
        a = tl.load(a_ptr + o_m * K + k + o_k[None, :])
        acc = tl.dot(a, tl.load(b_ptr + (k + o_k)[:, None] * N + o_n), acc)
    tl.store(y_ptr + (tl.program_id(0) * M + o_m) * N + o_n, acc.to(tl.bfloat16))


@triton.jit
def add_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    tl.atomic_add(y_ptr + tl.arange(0, BLOCK), tl.load(x_ptr + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)))


def copy(x: Tensor, y: Tensor, name: str = "copy_fwd", block: int = 1024, work: int = 0) -> None:
    Launch(
        name, copy_kernel, N // block, {"BLOCK": block, "WORK": work}, num_warps=4, num_stages=1,
        bytes_moved=8 * N, rows=N,
    ).start(x, y, N)  # fmt: skip


def product(x: Tensor, y: Tensor, name: str, rows: int, columns: int = 128, stages: int = 3, trips: int = 32) -> None:
    a, b, c = (x.to(torch.bfloat16) for _ in range(3))
    depth = 32 * 64
    Launch(
        name, product_kernel, 264, {"M": rows, "N": columns, "BLOCK_K": 64}, num_warps=4, num_stages=stages,
        bytes_moved=2 * (264 * rows * depth + depth * columns + 264 * rows * columns), rows=264 * rows,
        flops=2 * 264 * rows * columns * depth, loops=(trips,) if trips else (),
    ).start(a, b, c, depth)  # fmt: skip


def strided(x: Tensor, y: Tensor) -> None:
    Launch("narrow_fwd", strided_kernel, N // 1024, {"BLOCK": 1024}, 4, 1, bytes_moved=8 * N, rows=N).start(x, y, 3)


def add(x: Tensor, y: Tensor) -> None:
    Launch("atomic_fwd", add_kernel, N // 1024, {"BLOCK": 1024}, 4, 1, bytes_moved=4 * N, rows=N).start(x, y)


def good(x: Tensor, y: Tensor) -> None:
    copy(x, y)
    product(x, y, "product_fwd", rows=128)


WORK = int(os.environ.get("PLANTED_WORK", "0"))
PLANTED = {
    "good": good,
    "slow": lambda x, y: copy(x, y, "slow_fwd", block=2048, work=WORK),
    # a 128 x 256 accumulator over 4 warps is 256 registers a thread, one more than there are
    "spill": lambda x, y: product(x, y, "spill_fwd", rows=128, columns=256, stages=2),
    "narrow": strided,
    "no_wgmma": lambda x, y: product(x, y, "no_wgmma_fwd", rows=32),
    "undeclared": lambda x, y: product(x, y, "undeclared_fwd", rows=128, stages=4, trips=0),
    "atomic": add,
    "broken": lambda x, y: copy(x, y, "broken_fwd", block=1000),
    "crowded": lambda x, y: product(x, y, "crowded_fwd", rows=128, stages=9),
}


def inputs(shape: ModelShape, maker: Maker) -> Inputs:
    return {name: maker.normal(N, dtype=torch.float32) for name in ("x", "y")}


if __name__ == "__main__":
    names = sys.argv[1].split(",")
    operators = {name: Operator(name, inputs, PLANTED[name], in_place=True) for name in names}
    sys.exit(main(sys.argv[2:], operators, MODELS | {"B": replace(B, cases=tuple(names))}))
