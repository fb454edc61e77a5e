"""What the host spends on a training step of a GPU, measured without one: our kernels are stubbed at the driver.

    python benchmarks/host.py [--models B,L,XL] [--rounds 20] [--out benchmarks/results/host.jsonl]

The model has the depth of the real one and a handful of tiny pixels and columns, on the CPU: each operator, node of
autograd and launch is there, with next to nothing to compute. Our kernels go the way they go on a GPU, through Triton's
own argument binding, key and cache, to a driver that does nothing. PyTorch's own operators run on the CPU, whose
dispatch stands for CUDA's; their own share is what the same number of tiny operators takes. Noising, loss, forward and
backward are measured; clipping, optimizer and DeepSpeed are not.

share = host time / modelled GPU time of the step at 64 images, at the rates that benchmarks/traffic.py knows. Above 1
the GPU waits for the host; capturing the step in a CUDA graph takes the host out (train.cuda_graph).
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from machine import RESULTS, append, machine
from pixelgen_kernels import bodies
from pixelgen_kernels.launch import Launch
from pixelgen_kernels.registry import OPERATORS, Maker, Operator, differentiable, leaves, outputs
from pixelgen_kernels.shapes import MODELS, ModelShape
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm
from traffic import RATES, trace
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from pixelgen_fast import config as cfg
from pixelgen_fast.engine.objective import FlowMatching
from pixelgen_fast.models import pixeldit

IMAGES, TOKENS, PATCH, WIDTH, HEADS = 1, 4, 4, 64, 4


class Stub:
    """Triton's view of a GPU and of a compiled kernel, where nothing is compiled and nothing runs."""

    function = packed_metadata = None

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def launch_metadata(self, *_: Any) -> None:
        return None

    def run(self, *_: Any) -> None:
        return None


@contextmanager
def stubbed_kernels() -> Iterator[None]:
    """Operators on CPU tensors take the way of a GPU inside; their kernels do nothing, results are unset memory."""
    stub = Stub()

    def compile_nothing(self: JITFunction, key: Any, *_: Any, **__: Any) -> Stub:
        self.device_caches[0][0][key] = stub
        return stub

    triton.runtime.driver.set_active(stub)
    with (
        patch.object(JITFunction, "_do_compile", compile_nothing),
        patch.object(bodies, "INTERPRETED", True),
        patch.dict(os.environ, {bodies.VARIABLE: "triton"}),
    ):
        yield


class Counter(TorchDispatchMode):
    """Counts the operators that PyTorch dispatches, ours and views left out."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += func.namespace == "aten" and not func.is_view
        return func(*args, **(kwargs or {}))


class Step:
    """Forward and backward of a model of one named shape's depth, and nothing else of it."""

    def __init__(self, shape: ModelShape) -> None:
        config = pixeldit.Settings(
            hidden_size=WIDTH, num_heads=HEADS, patch_depth=shape.depth, pixel_depth=shape.pixel_depth, patch_size=PATCH
        )
        side = int(TOKENS**0.5) * PATCH
        model = pixeldit.build(config, side, num_classes=10)
        self.module = FlowMatching(model, cfg.Objective(), seed=0, null_class=10)
        self.images = torch.zeros(IMAGES, side, side, 3, dtype=torch.uint8)
        self.labels = self.numbers = torch.zeros(IMAGES, dtype=torch.int64)

    def forward(self) -> torch.Tensor:
        return self.module(self.images, self.labels, self.numbers)

    def times(self) -> tuple[float, float]:
        """Seconds of (forward, backward)."""
        start = time.perf_counter()
        loss = self.forward()
        middle = time.perf_counter()
        loss.backward()
        end = time.perf_counter()
        self.module.zero_grad()
        return middle - start, end - middle

    def counts(self) -> tuple[int, int]:
        """(PyTorch's operators, launches of ours) of a forward and a backward pass."""
        started = 0
        real = Launch.start

        def counting(launch: Launch, *arguments: Any) -> None:
            nonlocal started
            started += 1
            real(launch, *arguments)

        with patch.object(Launch, "start", counting):
            self.times()
        with Counter() as counter:
            self.times()
        return counter.calls, started


def median_seconds(call: Callable[[], Any], rounds: int) -> float:
    call()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def operator_seconds(operator: Operator, rounds: int) -> tuple[float, float]:
    """Seconds of one call of (forward, backward) at tiny sizes."""
    shape = ModelShape(
        "tiny", WIDTH, HEADS, ffn=2 * WIDTH, depth=1, pixel_depth=1, parameters=4096, batch=IMAGES, tokens=TOKENS,
        pixels=PATCH**2, patch=PATCH,
    )  # fmt: skip
    inputs = operator.inputs(shape, Maker(torch.float32, "cpu"))
    wanted = list(leaves(operator, inputs).values())
    flowing = [] if operator.in_place else differentiable(outputs(operator.function(**inputs)))
    if not flowing:
        return median_seconds(lambda: operator.function(**inputs), rounds), 0.0
    cotangents = [torch.zeros_like(x) for x in flowing]
    forward = median_seconds(lambda: operator.function(**inputs), rounds)
    backward = median_seconds(
        lambda: torch.autograd.grad(flowing, wanted, cotangents, retain_graph=True, allow_unused=True), rounds
    )
    return forward, backward


def spread_ms(values: list[float]) -> tuple[float, float, float]:
    """(10th percentile, median, 90th percentile) in milliseconds."""
    tenths = statistics.quantiles(values, n=10, method="inclusive")
    return 1e3 * tenths[0], 1e3 * statistics.median(values), 1e3 * tenths[8]


def main() -> int:
    args = _parser().parse_args()
    torch.set_num_threads(1)
    about = machine()
    print(f"{about['machine']}, torch {about['torch']}, Triton {about['triton']}; kernels stubbed at the driver\n")
    with stubbed_kernels():
        print("| operator | forward us | backward us |\n|---|--:|--:|")
        for operator in OPERATORS.values():
            forward, backward = operator_seconds(operator, args.rounds * 10)
            print(f"| {operator.name} | {forward * 1e6:.0f} | {backward * 1e6:.0f} |")
        models = args.models.split(",")
        steps = {name: Step(MODELS[name]) for name in models}
        counts = {name: step.counts() for name, step in steps.items()}
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
        gc.disable()
        for number in tqdm(range(-3, args.rounds), desc="steps", unit="round"):
            for name, step in steps.items():
                found = step.times()
                if number >= 0:
                    times[name].append(found)
            gc.collect()
        gc.enable()
    print(
        "\n| model | forward ms | backward ms | step ms, median (p10 to p90) | launches of ours | PyTorch's operators "
        "| GPU ms and share at the ceilings | at the best measured rates |\n|---|--:|--:|--:|--:|--:|--:|--:|"
    )
    for name in models:
        forward, backward = (statistics.median(column) * 1e3 for column in zip(*times[name], strict=True))
        low, middle, high = spread_ms([sum(pair) for pair in times[name]])
        operators, launches = counts[name]
        step = trace(MODELS[name], "triton")
        gpu = {name: 1e3 * step.seconds(rates) for name, rates in RATES.items()}
        row = {
            "model": name, "forward_ms": forward, "backward_ms": backward, "p10": low, "p50": middle, "p90": high,
            "launches": launches, "operators": operators, "gpu_ms": gpu,
        }  # fmt: skip
        shares = " | ".join(f"{ms:.1f}, {middle / ms:.0%}" for ms in gpu.values())
        print(
            f"| {name} | {forward:.1f} | {backward:.1f} | {middle:.1f} ({low:.1f} to {high:.1f}) | {launches} "
            f"| {operators} | {shares} |"
        )
        append(args.out, row | about)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--models", default="B,L,XL", help="by comma, of B, L, XL")
    parser.add_argument("--rounds", type=int, default=20, help="timed steps of each model, taking turns")
    parser.add_argument("--out", type=Path, default=RESULTS / "host.jsonl")
    return parser


if __name__ == "__main__":
    sys.exit(main())
