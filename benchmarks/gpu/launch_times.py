"""How long each launch of our kernels takes: the profiler's time on a GPU, the wall clock in Triton's interpreter.

    python -m gpu.launch_times XL 64

runs every case of a model once, forward and backward, for ncu to look at.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from operators import calls, cases
from pixelgen_kernels.bodies import forced
from pixelgen_kernels.launch import Launch
from pixelgen_kernels.registry import OPERATORS, Maker, Operator, differentiable, leaves
from pixelgen_kernels.shapes import MODELS, ModelShape
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from gpu.child import device


def launch_times(call: Callable[[], Any], place: str) -> list[tuple[Launch, float]]:
    """(launch, microseconds) of all that a call starts, in the order of starting.

    Raises RuntimeError where the profiler saw other kernels than were started.
    """
    started: list[Launch] = []
    took: list[float] = []
    real = Launch.start

    def noting(launch: Launch, *arguments: Any) -> None:
        begin = time.perf_counter()
        real(launch, *arguments)
        if launch.grid:
            started.append(launch)
            took.append(1e6 * (time.perf_counter() - begin))

    with patch.object(Launch, "start", noting):
        if place != "cuda":
            call()
        else:
            torch.cuda.synchronize()
            with profile(activities=[ProfilerActivity.CUDA]) as trace:
                call()
                torch.cuda.synchronize()
            names = {launch.kernel.fn.__name__ for launch in started}
            seen = [e for e in trace.events() if e.device_type == DeviceType.CUDA and e.name in names]
            seen.sort(key=lambda event: event.time_range.start)
            if [e.name for e in seen] != [launch.kernel.fn.__name__ for launch in started]:
                raise RuntimeError(f"{len(started)} launches were started and {len(seen)} kernels profiled")
            took = [event.time_range.elapsed_us() for event in seen]
    return list(zip(started, took, strict=True))


def prepared(operator: Operator, shape: ModelShape, place: str) -> Callable[[], Any]:
    """Forward and backward of an operator on random inputs at a model's sizes, with its kernels."""
    maker = Maker(torch.bfloat16 if place == "cuda" else torch.float32, place)
    inputs = operator.inputs(shape, maker)
    with forced("triton"):
        flows = leaves(operator, inputs)
        flowing = differentiable(operator.function(**inputs)) if flows else []
        cotangents = [maker.normal(*x.shape, dtype=x.dtype) for x in flowing]
        call = calls(operator, operator.function, inputs, cotangents, "both" if flows else "forward")

    def run() -> None:
        with forced("triton"):
            call()

    return run


def main() -> None:
    shape = MODELS[sys.argv[1]].with_batch(int(sys.argv[2]))
    for named in OPERATORS.values():
        for case, operator in cases(named).items():
            if case in shape.cases:
                prepared(operator, shape, device())()
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
