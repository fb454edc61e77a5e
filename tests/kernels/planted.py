"""Kernels with one planted fault each, compiled for sm_90 by test_report in a process without the interpreter."""

from __future__ import annotations

import os
import sys

import triton
import triton.language as tl
from pixelgen_kernels import report
from pixelgen_kernels.launch import Launch
from pixelgen_kernels.registry import Operator

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


def copy(name: str = "copy_fwd", block: int = 1024, num_warps: int = 4, work: int = 0, **other) -> Launch:
    values = dict(
        signature={"x_ptr": "*fp32", "y_ptr": "*fp32", "N": "i32"}, constexprs={"BLOCK": block, "WORK": work},
        num_stages=1, grid=N // block, flops=0, bytes_moved=8 * N, rows=N, divisible=("N",),
    )  # fmt: skip
    return Launch(name, copy_kernel, num_warps=num_warps, **{**values, **other})


def product(name: str, rows: int, columns: int = 128, depth: int = 2048, **other) -> Launch:
    values = dict(
        signature={"a_ptr": "*bf16", "b_ptr": "*bf16", "y_ptr": "*bf16", "K": "i32"},
        constexprs={"M": rows, "N": columns, "BLOCK_K": 64}, num_warps=4, num_stages=3, grid=264,
        flops=2 * 264 * rows * columns * depth, rows=264 * rows, loops=(depth // 64,), divisible=("K",),
        bytes_moved=2 * (264 * rows * depth + depth * columns + 264 * rows * columns),
    )  # fmt: skip
    return Launch(name, product_kernel, **{**values, **other})


def strided(name: str) -> Launch:
    signature = {"x_ptr": "*fp32", "y_ptr": "*fp32", "stride": "i32"}
    return Launch(name, strided_kernel, signature, {"BLOCK": 1024}, 4, 1, N // 1024, 0, 8 * N, N)


def add(name: str) -> Launch:
    return Launch(name, add_kernel, {"x_ptr": "*fp32", "y_ptr": "*fp32"}, {"BLOCK": 1024}, 4, 1, N // 1024, 0, 4 * N, N)


PLANTED = {
    "good": [copy(), product("product_fwd", rows=128)],
    "slow": [copy(work=int(os.environ.get("PLANTED_WORK", "0")))],
    # a 128 x 256 accumulator over 4 warps is 256 registers a thread, one more than there are
    "spill": [product("spill_fwd", rows=128, columns=256, num_stages=2)],
    "narrow": [strided("narrow_fwd")],
    "no_wgmma": [product("no_wgmma_fwd", rows=32)],
    "undeclared": [product("undeclared_fwd", rows=128, loops=())],
    "atomic": [add("atomic_fwd")],
    "broken": [copy("broken_fwd", constexprs={"BLOCK": 1000, "WORK": 0})],
    "crowded": [product("crowded_fwd", rows=128, num_stages=9)],
}


def operators(names: list[str]) -> dict[str, Operator]:
    return {
        name: Operator(name, None, "", launches=lambda shape, config: config, tuning=(PLANTED[name],)) for name in names
    }


if __name__ == "__main__":
    sys.exit(report.main(sys.argv[2:], operators(sys.argv[1].split(","))))
