"""Which body of an operator runs, and why.

An operator is one name with three bodies. `reference` is its definition in plain PyTorch, `native` its compiled CPU
body, `triton` its kernels. CUDA tensors get `triton`, CPU tensors `native` where csrc is built and `reference`
otherwise. PIXELGEN_OPS=reference|native|triton forces one: for parity tests and debugging. The kernels also run on CPU
tensors, slowly, in Triton's interpreter (TRITON_INTERPRET=1, set before this package is imported).

Tensors on "meta" have shapes only: whoever counts FLOPs or memory there gets the forced body, else the reference.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal, get_args

import numpy
import torch
import triton
from torch import Tensor
from torch.torch_version import TorchVersion

from pixelgen_kernels.native import has_native, native_problem

Body = Literal["reference", "native", "triton"]
BODIES = get_args(Body)

VARIABLE = "PIXELGEN_OPS"
# triton.jit asks for the interpreter when a kernel is defined, so the answer is fixed at import.
INTERPRETED = bool(triton.knobs.runtime.interpret)


def body(tensor: Tensor) -> Body:
    """The body that an operator runs on this tensor; float64 runs the reference unless another body is forced.

    Raises ValueError when PIXELGEN_OPS names no body, or one that cannot run on the tensor's device.
    """
    chosen = choose_body(tensor.device.type)[0]
    if tensor.dtype == torch.float64 and VARIABLE not in os.environ:
        return "reference"
    return chosen


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
    if forced == "native" and device != "meta" and (device != "cpu" or not has_native()):
        missing = f"runs on CPU tensors only, not on {device}" if device != "cpu" else f"cannot run: {native_problem()}"
        raise ValueError(f"{VARIABLE}=native {missing}; or unset {VARIABLE}")
    if forced == "triton" and device == "cpu" and not INTERPRETED:
        raise ValueError(
            f"{VARIABLE}=triton on a CPU tensor needs TRITON_INTERPRET=1 in the environment before Python starts; "
            f"or move the tensor to a GPU, or unset {VARIABLE}"
        )
    if forced == "triton" and device == "cpu" and (problem := interpreter_problem()):
        raise ValueError(f"{VARIABLE}=triton on a CPU tensor: {problem}")
    return forced, f"{VARIABLE}={forced}"


@functools.cache
def interpreter_problem(triton_version: str = triton.__version__, numpy_version: str = numpy.__version__) -> str:
    """Why Triton's interpreter cannot run the kernels with these versions; empty when it can."""
    if TorchVersion(triton_version) >= (3, 7) or TorchVersion(numpy_version) < (2, 4):
        return ""
    return (
        f"the interpreter of Triton {triton_version} fails with numpy {numpy_version}; "
        'run `pip install "numpy<2.4"`, or install a PyTorch that brings Triton 3.7 or later'
    )


@contextmanager
def forced(name: Body) -> Iterator[None]:
    """Every operator takes this body inside, whatever PIXELGEN_OPS says."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = name
    try:
        yield
    finally:
        if before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = before


def gpu_bodies() -> AbstractContextManager[None]:
    """Meta tensors take the bodies of a GPU inside, unless PIXELGEN_OPS says otherwise already."""
    return nullcontext() if VARIABLE in os.environ else forced("triton")
