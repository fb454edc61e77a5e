"""What the operators share: which body runs, how an operator is registered, what its inputs must be.

An operator is one name with three bodies. `reference` is its definition in plain PyTorch, `native` its compiled CPU
body, `triton` its kernels. CUDA tensors get `triton`, CPU tensors `native` where the extension is built and
`reference` otherwise. PIXELGEN_OPS=reference|native|triton forces one: for parity tests and debugging. The kernels
also run on CPU tensors, slowly, in Triton's interpreter (TRITON_INTERPRET=1, set before this package is imported).
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from pixelgen_kernels.launch import Launch

Body = Literal["reference", "native", "triton"]

VARIABLE = "PIXELGEN_OPS"
NATIVE_EXTENSION = "pixelgen_kernels._native"
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# triton.jit asks for the interpreter when a kernel is defined, so the answer is fixed at import.
INTERPRETED = bool(triton.knobs.runtime.interpret)
# Rows and columns of one step of sum_partials: few columns, so that many programs share a narrow sum.
SUM_BLOCK_R, SUM_BLOCK_C, SUM_WARPS = 256, 16, 8


def body(tensor: Tensor) -> Body:
    """The body that an operator runs on this tensor.

    Raises ValueError when PIXELGEN_OPS names no body, or one that cannot run on the tensor's device.
    """
    return choose_body(tensor.device.type)[0]


def describe_bodies(device: str) -> str:
    """One line for the log: which body the operators run on "cuda", "cpu" or "meta", and why."""
    chosen, reason = choose_body(device)
    return f"operators: {chosen} ({reason})"


@torch.compiler.assume_constant_result
def choose_body(device: str) -> tuple[Body, str]:
    """(body, reason) for a device type. Raises ValueError as `body` does."""
    forced = os.environ.get(VARIABLE, "")
    if not forced:
        if device == "cuda":
            return "triton", "CUDA device"
        if device == "cpu" and has_native():
            return "native", "CPU, compiled extension found"
        return "reference", f"{device}, no compiled extension" if device == "cpu" else f"{device} device"
    if forced not in get_args(Body):
        raise ValueError(f"{VARIABLE}={forced!r} names no body; use one of {', '.join(get_args(Body))}, or unset it")
    if forced == "native" and (device != "cpu" or not has_native()):
        missing = "runs on CPU tensors only" if device != "cpu" else f"needs the compiled {NATIVE_EXTENSION}"
        raise ValueError(f"{VARIABLE}=native {missing}; build it, or unset {VARIABLE} (tensor on {device})")
    if forced == "triton" and device == "cpu" and not INTERPRETED:
        raise ValueError(
            f"{VARIABLE}=triton on a CPU tensor needs TRITON_INTERPRET=1 in the environment before Python starts; "
            f"or move the tensor to a GPU, or unset {VARIABLE}"
        )
    return forced, f"{VARIABLE}={forced}"


@functools.cache
def has_native() -> bool:
    return importlib.util.find_spec(NATIVE_EXTENSION) is not None


def operator(name: str, fake: Callable[..., Any], flops: Callable[..., int] | None = None) -> Callable[..., Any]:
    """Decorator that registers a launcher as torch.ops.pixelgen.<name> and returns the torch.library.CustomOpDef.

    fake: same arguments, returns empty outputs of the same shapes, strides and dtypes. flops: shapes of the tensor
    arguments and the other arguments as they are, keyword out_shape; 2 x multiply-adds of the matrix products.
    The launcher's first argument is a tensor; its kernels start on that tensor's device.
    """

    def register(launcher: Callable[..., Any]) -> Any:
        @functools.wraps(launcher)
        def on_device(*args: Any, **kwargs: Any) -> Any:
            with torch.cuda.device_of(args[0]):
                return launcher(*args, **kwargs)

        schema = torch.library.infer_schema(launcher, mutates_args=())
        op = torch.library.custom_op(f"pixelgen::{name}", on_device, mutates_args=(), schema=schema)
        op.register_fake(fake)
        if flops is not None:
            register_flop_formula(getattr(torch.ops.pixelgen, name))(flops)
        return op

    return register


def check(op: str, like: Tensor, *, rows: Sequence[str] = (), **wanted: tuple[Tensor, tuple[int, ...]]) -> None:
    """Check the inputs of operator `op`, given as name=(tensor, shape). Arguments named in `rows` need unit stride
    in their last dimension only; the others must be contiguous. All must be on the device of `like`.

    Raises ValueError naming the argument, what it is and what is needed.
    """
    chosen = body(like)
    for name, (tensor, shape) in wanted.items():
        if tuple(tensor.shape) != tuple(shape):
            raise ValueError(f"{op}: {name} must be {list(shape)}, got {list(tensor.shape)}")
        if tensor.dtype not in KERNEL_DTYPES and not (tensor.dtype == torch.float64 and chosen == "reference"):
            raise ValueError(
                f"{op}: {name} must be float32, bfloat16 or float16, got {tensor.dtype}"
                + (f"; only {VARIABLE}=reference takes float64" if tensor.dtype == torch.float64 else "")
            )
        if tensor.device != like.device:
            raise ValueError(f"{op}: {name} must be on {like.device}, got {tensor.device}")
        if name in rows:
            if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
                raise ValueError(
                    f"{op}: {name} must have unit stride in its last dimension, got strides {tensor.stride()}; "
                    "call .contiguous() first"
                )
        elif not tensor.is_contiguous():
            raise ValueError(
                f"{op}: {name} must be contiguous, got {list(tensor.shape)} with strides {tensor.stride()}; "
                "call .contiguous() first"
            )


def sum_partials(partials: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum float32 partial results [programs, ...] over their first dimension in a fixed order: [...] in dtype."""
    out = partials.new_empty(partials.shape[1:], dtype=dtype)
    columns = out.numel()
    grid = (triton.cdiv(columns, SUM_BLOCK_C),)
    sum_partials_kernel[grid](partials, out, partials.shape[0], columns, SUM_BLOCK_R, SUM_BLOCK_C, num_warps=SUM_WARPS)
    return out


def sum_partials_launch(name: str, programs: int, columns: int, rows: int, dtype: str = "*bf16") -> Launch:
    """The launch of sum_partials over [programs, columns], for an operator's aot(). rows: as in Launch."""
    return Launch(
        name=name,
        kernel=sum_partials_kernel,
        signature={"partial_ptr": "*fp32", "out_ptr": dtype, "R": "i32"},
        constexprs={"C": columns, "BLOCK_R": SUM_BLOCK_R, "BLOCK_C": SUM_BLOCK_C},
        num_warps=SUM_WARPS,
        num_stages=1,
        grid=triton.cdiv(columns, SUM_BLOCK_C),
        flops=0,
        bytes_moved=programs * columns * 4,
        rows=rows,
        loops=(triton.cdiv(programs, SUM_BLOCK_R),),
        divisible=("R",) if programs % 16 == 0 else (),
    )


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


def multiprocessors(device: torch.device) -> int:
    """How many programs of a persistent kernel run side by side: the GPU's multiprocessors, 2 in the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
