"""Compile ahead of a run, on the GPU it will use, every kernel that a model's shape needs.

Triton's own warm-up entry builds the same key as a launch with tensors does, so the run finds each kernel in
Triton's cache and starts without compiling.
"""

from __future__ import annotations

from time import perf_counter
from typing import Any

import torch
from triton.runtime.jit import MockTensor

from pixelgen_kernels.launch import Launch, ModelShape
from pixelgen_kernels.registry import OPERATORS

_POINTERS = {
    "*bf16": torch.bfloat16, "*fp16": torch.float16, "*fp32": torch.float32, "*fp64": torch.float64,
    "*i1": torch.bool, "*i8": torch.int8, "*u8": torch.uint8, "*i32": torch.int32, "*i64": torch.int64,
}  # fmt: skip


def warmup(shape: ModelShape) -> str:
    """Compile the shipped configuration of every operator at a shape; returns one line that says what was done.

    Without a GPU nothing is compiled and the line says so: the kernels of a run are compiled for its own GPU.
    """
    if not torch.cuda.is_available():
        return (
            "kernels warmup: nothing to do without a GPU, because kernels are compiled for the GPU that runs them; "
            "pixelgen kernels report compiles them for an H100 that is not there"
        )
    start, count = perf_counter(), 0
    for operator in OPERATORS.values():
        for config in operator.configs[:1]:
            for launch in operator.every_launch(shape, config):
                launch.kernel.warmup(**arguments(launch), grid=(1,))
                count += 1
    name = torch.cuda.get_device_name()
    return f"kernels warmup: {count} kernels of {shape.name} for {name} in {perf_counter() - start:.1f} s"


def arguments(launch: Launch) -> dict[str, Any]:
    """Arguments of `kernel.warmup` with the types, alignments and constants of a launch; pointers point nowhere."""
    values: dict[str, Any] = {}
    for name, kind in launch.signature.items():
        if kind.startswith("*"):
            values[name] = MockTensor(_POINTERS[kind])
        elif kind.startswith(("fp", "bf")):
            values[name] = 0.5
        else:
            base = 2**40 if kind == "i64" else 64
            values[name] = base if name in launch.divisible else base + 3
    return {
        **values,
        **launch.constexprs,
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
        **launch.options,
    }
