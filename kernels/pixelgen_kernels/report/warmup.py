"""Compile ahead of a run, on the GPU it will use, every kernel that it starts.

Triton's own warm-up entry builds the same key as a launch with tensors does, so the run finds each kernel in
Triton's cache and starts without compiling.
"""

from __future__ import annotations

from collections.abc import Iterable
from time import perf_counter
from typing import Any

import torch
from triton.runtime.jit import MockTensor

from pixelgen_kernels.launch import POINTERS, Started

DTYPES = {name: dtype for dtype, name in POINTERS.items()}


class Unaligned(MockTensor):
    """Stands for a tensor that does not begin at a multiple of 16 bytes."""

    @staticmethod
    def data_ptr() -> int:
        return 4


def warmup(launches: Iterable[Started], name: str) -> str:
    """Compile launches for the GPU that is there, each kernel once; returns one line that says what was done.

    name: of what is prepared. Without a GPU nothing is compiled and the line says so: the kernels of a run are compiled
    for its own GPU.
    """
    if not torch.cuda.is_available():
        return (
            "kernels warmup: nothing to do without a GPU, because kernels are compiled for the GPU that runs them; "
            "pixelgen kernels report compiles them for an H100 that is not there"
        )
    start = perf_counter()
    count = warm(launches)
    seconds = perf_counter() - start
    return f"kernels warmup: {count} kernels of {name} for {torch.cuda.get_device_name()} in {seconds:.1f} s"


def warm(launches: Iterable[Started]) -> int:
    """Compile launches for the GPU that is there, each kernel once; how many there are."""
    kernels = distinct(launches)
    for started in kernels:
        compile_here(started)
    return len(kernels)


def distinct(launches: Iterable[Started]) -> list[Started]:
    """The first launch of each compiled kernel."""
    found: dict[Any, Started] = {}
    for started in launches:
        found.setdefault(started.key, started)
    return list(found.values())


def compile_here(started: Started) -> None:
    """Compile one launch for the GPU that is there, into Triton's cache."""
    launch = started.launch
    launch.kernel.warmup(*arguments(started), grid=(1,), **launch.keywords)


def arguments(started: Started) -> list[Any]:
    """Pointers and numbers with the types and alignments of a launch, as `Launch.start` takes them."""
    names = [name for name in started.launch.kernel.arg_names if name not in started.launch.constants]
    return [_argument(started, name) for name in names]


def _argument(started: Started, name: str) -> Any:
    if name in started.constants:
        return started.constants[name]
    kind, aligned = started.signature[name], name in started.aligned
    if kind.startswith("*"):
        return (MockTensor if aligned else Unaligned)(DTYPES[kind])
    if kind == "fp32":
        return 0.5
    return (2**40 if kind == "i64" else 64) + (0 if aligned else 3)
