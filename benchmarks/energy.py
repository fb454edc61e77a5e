"""What the energy-guided path costs a training step: measured on this CPU, and counted for PixelDiT-XL on an H100.

    python benchmarks/energy.py [--configs digits16,m64] [--rounds 15] [--out benchmarks/results/energy.jsonl]
    python benchmarks/energy.py --count

Measured: the trainer's whole step (benchmarks/step.py) on three ways that take turns, and the making of a training pair
alone, on the linear path and on this one, in CPU seconds of the process, which others on the machine do not change
much. "plain" is the linear path as it runs; "asked" the linear path with the model asked for its prediction, as this
path needs it, instead of noising and comparing inside its own operators; "guided" this path. share: of the guided step,
what its pair takes more than a linear one.

Counted (--count): operations of a step of 64 images of 256 px, traced on the meta device as benchmarks/traffic.py does,
here with a second pass over the data for a transform of two axes. Modelled, not measured: bytes at 2.8 TB/s, products
at 630 TFLOP/s, no kernel below 3 us; work of the host, caches and overlap are left out.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
from machine import RESULTS, append, machine, spread
from pixelgen_kernels.bodies import forced
from pixelgen_kernels.report.command import BASELINE
from pixelgen_kernels.shapes import MODELS
from step import CASES, WARM_UP
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm
from traffic import RATES, build, in_phase
from training import Training

from pixelgen_fast.config import Objective
from pixelgen_fast.diffusion.path import Noising
from pixelgen_fast.engine.memory import keep_freed_memory
from pixelgen_fast.engine.objective import FlowMatching
from pixelgen_fast.engine.pair import EnergyPair, LinearPair
from pixelgen_fast.planning.gpu_kernels import gpu_kernels
from pixelgen_fast.planning.rates import Rates
from pixelgen_fast.planning.trace import Recorder, Trace, modelled

GUIDED = Objective(path="energy_guided")
SHORTEST = 3e-6  # seconds of a kernel that has hardly anything to do
HEAD = ("config", "plain ms", "asked / plain", "guided / plain", "guided / asked", "guided pair ms", "linear pair ms")


class Steps:
    """The ways through a step of one case, as functions that take no argument."""

    def __init__(self, name: str) -> None:
        case = CASES[name]
        plain, asked, guided = (
            Training(replace(case, objective=objective), "cpu", "native")
            for objective in (Objective(), Objective(), GUIDED)
        )
        asked.module.model.fuses_loss = False
        self.images, self.path = plain.images, guided.module.path
        self.x, self.e, self.t = pair_inputs(plain)
        self.ways = {
            "plain": plain.step,
            "asked": asked.step,
            "guided": guided.step,
            "linear pair": lambda: LinearPair(Objective(), self.x, self.e, self.t),
            "guided pair": lambda: EnergyPair(GUIDED, self.path, self.x, self.e, self.t),
        }


def pair_inputs(training: Training) -> tuple[Tensor, Tensor, Tensor]:
    """Data, noise and times of a training's images."""
    t = torch.sigmoid(torch.randn(len(training.images), generator=torch.Generator().manual_seed(0)))
    return *Noising(training.numbers, t, 0, 1.0).pair(training.images), t


def cpu_seconds(call: Callable[[], object]) -> float:
    """CPU seconds of one call, on all threads of the process."""
    begin = time.process_time()
    call()
    return time.process_time() - begin


def measure(names: list[str], rounds: int, out: Path) -> None:
    keep_freed_memory()
    about = machine()
    print(f"{about['machine']}, torch {about['torch']}\n")
    print("| " + " | ".join((*HEAD, "share")) + " |")
    print("|---" + "|--:" * len(HEAD) + "|")
    for name in names:
        steps = Steps(name)
        times: dict[str, list[float]] = {way: [] for way in steps.ways}
        for number in tqdm(range(WARM_UP + rounds), desc=name, unit="round"):
            for way, call in steps.ways.items():
                elapsed = cpu_seconds(call)
                if number >= WARM_UP:
                    times[way].append(elapsed)
        found = {way: spread(values) for way, values in times.items()}

        def ratio(a: str, b: str, times: dict[str, list[float]] = times) -> str:
            low, middle, high = spread(x / y for x, y in zip(times[a], times[b], strict=True))
            return f"{middle:.3f} ({low:.3f} to {high:.3f})"

        more = found["guided pair"][1] - found["linear pair"][1]
        share = more / found["guided"][1]
        cells = [f"{found['plain'][1] * 1e3:.1f}", ratio("asked", "plain"), ratio("guided", "plain")]
        cells += [ratio("guided", "asked"), f"{found['guided pair'][1] * 1e3:.2f}"]
        cells += [f"{found['linear pair'][1] * 1e3:.2f}", f"{share:.1%}"]
        print(f"| {name} | " + " | ".join(cells) + " |")
        append(out, {"config": name, "batch": len(steps.images), "share": share, "seconds": found} | about)


class Transforms(TorchDispatchMode):
    """Sums over Fourier transforms: bytes of one pass, and 2.5 N log2 N operations for images of N real numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.flops = 0, 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func._schema.name.startswith("aten::_fft"):
            real = max((args[0], out), key=lambda x: not x.is_complex())
            self.bytes += args[0].numel() * args[0].element_size() + out.numel() * out.element_size()
            self.flops += 2.5 * real.numel() * math.log2(real[0, 0].numel())
        return out


@dataclass(frozen=True)
class Floored(Rates):
    """Rates at which no kernel takes less than SHORTEST."""

    def time(self, flops: float, moved: float) -> float:
        return max(super().time(flops, moved), SHORTEST)


FLOORED = Floored(RATES["best"].products, RATES["best"].memory)


def counted(objective: Objective, fuses: bool) -> tuple[Trace, Transforms]:
    """One step of PixelDiT-XL on the meta device. fuses: whether the model may noise and compare by itself."""
    shape = MODELS["XL"]
    ours, module = modelled([shape], BASELINE), FlowMatching(build(shape, "triton"), objective, 0, 1000)
    module.model.fuses_loss = fuses
    with torch.device("meta"):
        images = torch.empty(shape.batch, shape.image, shape.image, 3, dtype=torch.uint8)
        labels, numbers = (torch.zeros(shape.batch, dtype=torch.int64) for _ in range(2))
    trace, transforms = Trace(shape.batch), Transforms()
    with forced("triton"), gpu_kernels(fused_norms=False):
        with transforms, Recorder(trace, ours, in_phase("forward")):
            loss = module(images, labels, numbers)
        with Recorder(trace, ours, in_phase("backward")):
            loss.backward()
    return trace, transforms


def count() -> None:
    """Print what a step of PixelDiT-XL moves and starts on each way."""
    shape = MODELS["XL"]
    print(f"PixelDiT-XL, {shape.batch} images of {shape.image} px, bf16: modelled for an H100, not measured\n")
    print("| step | GB | kernels | ms | more than plain | GB in transforms | GFLOP in transforms |")
    print("|---|--:|--:|--:|--:|--:|--:|")
    plain = 0.0
    ways = {"plain": (Objective(), True), "asked": (Objective(), False), "guided": (GUIDED, False)}
    for way, (objective, fuses) in ways.items():
        trace, transforms = counted(objective, fuses)
        time = trace.seconds(FLOORED) + transforms.bytes / FLOORED.memory
        plain = plain or time
        print(
            f"| {way} | {(trace.total('bytes') + transforms.bytes) / 1e9:.2f} | {trace.total('kernels')} "
            f"| {time * 1e3:.2f} | {time / plain - 1:.1%} | {2 * transforms.bytes / 1e9:.2f} "
            f"| {transforms.flops / 1e9:.1f} |"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--configs", default="digits16,m64", help=f"by comma, of {', '.join(CASES)}")
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds of every way")
    parser.add_argument("--count", action="store_true", help="count for an H100 instead of measuring here")
    parser.add_argument("--out", type=Path, default=RESULTS / "energy.jsonl")
    args = parser.parse_args()
    if args.count:
        count()
    else:
        with forced("native"):
            measure(args.configs.split(","), args.rounds, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
