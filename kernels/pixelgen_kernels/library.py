"""What the operators share: which body runs, how an operator is registered, what its inputs must be.

An operator is one name with three bodies. `reference` is its definition in plain PyTorch, `native` its compiled CPU
body, `triton` its kernels. CUDA tensors get `triton`, CPU tensors `native` where the extension is built and
`reference` otherwise. PIXELGEN_OPS=reference|native|triton forces one: for parity tests and debugging. The kernels
also run on CPU tensors, slowly, in Triton's interpreter (TRITON_INTERPRET=1, set before this package is imported).

In torch's dispatcher `pixelgen::<op>` is the kernels on CUDA and csrc on CPU. For the interpreter the kernels are
registered under `pixelgen_interpreter::<op>`, so that one process can compare all bodies on the same CPU tensors.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from pixelgen_kernels import build
from pixelgen_kernels.launch import Launch

Body = Literal["reference", "native", "triton"]
BODIES = get_args(Body)

VARIABLE = "PIXELGEN_OPS"
# another file is for a sanitised or profiled build
NATIVE_LIBRARY = Path(os.environ.get("PIXELGEN_NATIVE_LIBRARY") or Path(__file__).resolve().parent / build.NAME)
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# triton.jit asks for the interpreter when a kernel is defined, so the answer is fixed at import.
INTERPRETED = bool(triton.knobs.runtime.interpret)
# Rows and columns of one step of sum_partials: few columns, so that many programs share a narrow sum.
SUM_BLOCK_R, SUM_BLOCK_C, SUM_WARPS = 256, 16, 8
NAMESPACE = "pixelgen_interpreter" if INTERPRETED else "pixelgen"
kernels = getattr(torch.ops, NAMESPACE)


def body(tensor: Tensor) -> Body:
    """The body that an operator runs on this tensor; float64 runs the reference unless another body is forced.

    Raises ValueError when PIXELGEN_OPS names no body, or one that cannot run on the tensor's device.
    """
    chosen = choose_body(tensor.device.type)[0]
    return "reference" if tensor.dtype == torch.float64 and VARIABLE not in os.environ else chosen


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
            return "native", "CPU, csrc compiled"
        return "reference", native_problem() if device == "cpu" else f"{device} device"
    if forced not in BODIES:
        raise ValueError(f"{VARIABLE}={forced!r} names no body; use one of {', '.join(BODIES)}, or unset it")
    if forced == "native" and (device != "cpu" or not has_native()):
        missing = f"runs on CPU tensors only, not on {device}" if device != "cpu" else f"cannot run: {native_problem()}"
        raise ValueError(f"{VARIABLE}=native {missing}; or unset {VARIABLE}")
    if forced == "triton" and device == "cpu" and not INTERPRETED:
        raise ValueError(
            f"{VARIABLE}=triton on a CPU tensor needs TRITON_INTERPRET=1 in the environment before Python starts; "
            f"or move the tensor to a GPU, or unset {VARIABLE}"
        )
    return forced, f"{VARIABLE}={forced}"


@functools.cache
def has_native() -> bool:
    """Whether the compiled CPU bodies are there; opens them. Says so once when a library is there that cannot run."""
    return not native_problem()


@functools.cache
def native_problem() -> str:
    """Why the compiled CPU bodies cannot run; empty when they can."""
    if not NATIVE_LIBRARY.is_file():
        return "csrc is not compiled; run `pixelgen kernels build`, which needs a C++ compiler"
    try:
        torch.ops.load_library(NATIVE_LIBRARY)
        built_for = torch.ops.pixelgen_native.torch_version()
    except (OSError, RuntimeError) as error:
        problem = f"it cannot be loaded ({error})"
    else:
        if built_for.split("+")[0] == torch.__version__.split("+")[0]:
            return ""
        problem = f"it was compiled for PyTorch {built_for}, this is {torch.__version__}"
    problem = f"{NATIVE_LIBRARY}: {problem}; run `pixelgen kernels build`"
    warnings.warn(problem, RuntimeWarning, stacklevel=2)
    return problem


def operator(
    name: str, fake: Callable[..., Any], flops: Callable[..., int] | None = None, mutates: Sequence[str] = ()
) -> Callable[..., Any]:
    """Decorator that registers a launcher as the Triton body of pixelgen::<name>; returns its CustomOpDef.

    fake: same arguments, returns empty outputs of the same shapes, strides and dtypes. flops: shapes of the tensor
    arguments and the other arguments as they are, keyword out_shape; 2 x multiply-adds of the matrix products.
    mutates: arguments that it changes. The launcher's first argument is a tensor; its kernels start on that tensor's
    device. csrc registers the CPU body and its gradient under the same name when it is loaded.
    """

    def register(launcher: Callable[..., Any]) -> Any:
        @functools.wraps(launcher)
        def on_device(*args: Any, **kwargs: Any) -> Any:
            with torch.cuda.device_of(args[0]):
                return launcher(*args, **kwargs)

        schema = torch.library.infer_schema(launcher, mutates_args=mutates)
        op = torch.library.custom_op(f"{NAMESPACE}::{name}", on_device, mutates_args=mutates, schema=schema)
        op.register_fake(fake)
        if NAMESPACE != "pixelgen":
            torch.library.define(f"pixelgen::{name}", schema)
            torch.library.register_fake(f"pixelgen::{name}", fake)
        if flops is not None:
            register_flop_formula([getattr(space, name) for space in {kernels, torch.ops.pixelgen}])(flops)
        return op

    return register


def compiled(tensor: Tensor) -> Any:
    """The dispatcher's namespace in which this tensor's body of each operator is registered; None: the reference.

    Raises ValueError as `body` does.
    """
    chosen = body(tensor)
    if chosen == "reference":
        return None
    return torch.ops.pixelgen if chosen == "native" else kernels


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
