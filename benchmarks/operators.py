"""Time every operator of the registry against eager PyTorch, torch.compile and Liger-Kernel on this machine.

    python benchmarks/operators.py [--ops swiglu] [--models XL] [--batch 64] [--passes forward,backward,both]
        [--providers ours,eager,compile,liger] [--device cuda] [--rounds 50] [--out benchmarks/results/operators.jsonl]

An operator is timed only after its outputs and gradients agree with its definition in float64; a red one is refused
and the command exits with 1. Providers take turns, so that a drift of the clock meets all of them; inputs are random
and rotate through enough copies to leave the cache. On a GPU events are timed after a warm-up; on a CPU the wall
clock, for the CPU body of each operator. Each row names machine, versions and commit and is appended as JSONL.

GB/s and TFLOP/s are the operator's ideal bytes and FLOPs (registry.work) over the median; share = the larger of
both relative to what a copy and a matrix product reach here, measured at the start.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config
from machine import RESULTS, append, machine
from pixelgen_kernels import library
from pixelgen_kernels.launch import MODELS, ModelShape
from pixelgen_kernels.registry import OPERATORS, Inputs, Maker, Operator, differentiable, leaves, outputs, tensors, work
from torch import Tensor

CACHE_BYTES = 256e6  # five times the L2 cache of an H100
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
PASSES = ("forward", "backward", "both")
PROVIDERS = ("ours", "eager", "compile", "liger")


@dataclass(frozen=True)
class Ceiling:
    """What this machine reaches: bytes per second of a copy, FLOP per second of a large matrix product."""

    bandwidth: float
    flops: float


def liger_swiglu(packed: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_swiglu as function

    return function(*packed.chunk(2, dim=-1))


def liger_norm_modulate(
    x_BLD: Tensor, weight_D: Tensor, shift_BD: Tensor, scale_BD: Tensor, branch_BLD: Tensor, gate_BD: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    from liger_kernel.transformers.functional import liger_modulated_rms_norm as function

    x_BLD = x_BLD + gate_BD[:, None] * branch_BLD
    return function(x_BLD, weight_D, scale_BD, shift_BD, eps, 0.0, "llama", False), x_BLD


LIGER = {"swiglu": liger_swiglu, "norm_modulate": liger_norm_modulate}


def provider(name: str, operator: Operator, device: str) -> Callable[..., Any] | None:
    """The function to time, or None where the provider has nothing of its own for this operator and device."""
    if name == "ours":
        return operator.function if library.choose_body(device)[0] != "reference" else None
    if name == "eager":
        return operator.reference
    if name == "compile":
        # backward alone repeats over one kept graph, so a compiled backward must not take over its buffers
        torch._functorch.config.donated_buffer = False
        return torch.compile(operator.reference)
    return LIGER.get(operator.name) if device == "cuda" else None


def disagreement(operator: Operator, function: Callable[..., Any], shape: ModelShape, maker: Maker) -> float:
    """Largest ||out - ref|| / ||ref|| over outputs and gradients, in units of what is tolerated; up to 1 is right.

    The reference is the definition in float64 on the same random inputs, two images of the shape. Tolerated is
    TOLERANCE of the dtype, or four times the error of the definition itself in that dtype where a sum cancels.
    """
    small = ModelShape(**{**asdict(shape), "batch": 2, "parameters": 4 * 1000})
    mine, eager, exact = (operator.inputs(small, Maker(maker.dtype, maker.device)) for _ in range(3))
    out = _results(operator, function, mine, maker)
    plain = _results(operator, operator.reference, eager, maker)
    ref = _results(operator, operator.reference, _cast(exact, torch.float64), maker)
    worst = 0.0
    for a, b, c in zip(out, plain, ref, strict=True):
        error, own = (float((x.double() - c).norm() / c.norm().clamp_min(1e-30)) for x in (a, b))
        worst = max(worst, error / max(TOLERANCE[a.dtype], 4 * own))
    return worst


def _results(operator: Operator, function: Callable[..., Any], inputs: Inputs, maker: Maker) -> list[Tensor]:
    """Outputs and gradients for the same random output gradients every time; changed tensors of one in place."""
    if operator.in_place:
        function(**inputs)
        return [x for name, x in tensors(inputs).items() if name not in operator.constant]
    wanted = leaves(operator, inputs)
    out = outputs(function(**inputs))
    cotangents = Maker(maker.dtype, maker.device, seed=1)
    flowing = [(x, cotangents.normal(*x.shape).to(x.dtype)) for x in out if x.requires_grad]
    found = torch.autograd.grad(
        [x for x, _ in flowing], list(wanted.values()), [dx for _, dx in flowing], allow_unused=True
    )
    return [x.detach() for x in (*out, *found) if x is not None]


def _cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    def one(x: Any) -> Any:
        if isinstance(x, Tensor):
            return x.to(dtype) if x.is_floating_point() else x
        if isinstance(x, tuple):
            made = [one(y) for y in x]
            return type(x)(*made) if hasattr(x, "_fields") else tuple(made)
        return x

    return {name: one(x) for name, x in inputs.items()}


class Timer:
    """Milliseconds of one call: events on a GPU, the wall clock on a CPU."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"

    def __call__(self, call: Callable[[], Any]) -> float:
        if not self.cuda:
            start = time.perf_counter()
            call()
            return 1e3 * (time.perf_counter() - start)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)


def calls(
    operator: Operator, function: Callable[..., Any], inputs: Inputs, cotangents: list[Tensor], which: str
) -> Callable[[], Any]:
    """One call of a pass over one set of inputs. backward repeats over one kept graph."""
    if operator.in_place or which == "forward":
        return lambda: function(**inputs)
    wanted = list(leaves(operator, inputs).values())
    if which == "both":
        return lambda: torch.autograd.grad(differentiable(function(**inputs)), wanted, cotangents, allow_unused=True)
    graph = differentiable(function(**inputs))
    return lambda: torch.autograd.grad(graph, wanted, cotangents, retain_graph=True, allow_unused=True)


def measure(
    operator: Operator, shape: ModelShape, dtype: torch.dtype, device: str, which: str,
    functions: dict[str, Callable[..., Any]], rounds: int,
) -> dict[str, dict[str, float]]:  # fmt: skip
    """Provider -> ms at p20, p50, p80 and peak bytes beyond the inputs, the providers taking turns."""
    maker, timer = Maker(dtype, device), Timer(device)
    first = operator.inputs(shape, maker)
    size = sum(x.numel() * x.element_size() for x in tensors(first).values())
    copies = [first] + [operator.inputs(shape, maker) for _ in range(min(8, int(CACHE_BYTES // size)))]
    for inputs in copies:
        leaves(operator, inputs)
    flowing = [] if operator.in_place else differentiable(operator.reference(**first))
    cotangents = [maker.normal(*x.shape, dtype=x.dtype) for x in flowing]
    samples: dict[str, list[float]] = {name: [] for name in functions}
    ready = {
        name: [calls(operator, function, inputs, cotangents, which) for inputs in copies]
        for name, function in functions.items()
    }
    for turn in range(-3, rounds):
        for name, variants in ready.items():
            elapsed = timer(variants[turn % len(variants)])
            if turn >= 0:
                samples[name].append(elapsed)
    result = {}
    for name, values in samples.items():
        quantiles = torch.tensor(values).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
        result[name] = dict(zip(("p20", "p50", "p80"), quantiles, strict=True), peak=_peak(ready[name][0], device))
    return result


def _peak(call: Callable[[], Any], device: str) -> float | None:
    if device != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def ceiling(device: str, dtype: torch.dtype) -> Ceiling:
    """Best of ten copies of 1 GB (64 MB on a CPU) and of ten square matrix products of 8192 (1024)."""
    timer, gpu = Timer(device), device == "cuda"
    source = torch.randn((1 << 28) if gpu else (1 << 24), device=device)
    target = torch.empty_like(source)
    n = 8192 if gpu else 1024
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    copy = min(timer(lambda: target.copy_(source)) for _ in range(10))
    product = min(timer(lambda: a @ b) for _ in range(10))
    return Ceiling(2 * source.numel() * 4 / copy * 1e3, 2 * n**3 / product * 1e3)


def line(row: dict[str, Any]) -> str:
    """One row as Markdown."""
    peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.0f}"
    return (
        f"| {row['operator']} | {row['model']} | {row['pass']} | {row['provider']} "
        f"| {row['p20']:.3f} | {row['p50']:.3f} | {row['p80']:.3f} "
        f"| {row['gb_per_s']:.0f} | {row['tflop_per_s']:.2f} | {row['share']:.0%} | {peak} |"
    )


def main() -> int:
    args = _parser().parse_args()
    device = args.device
    dtype = getattr(torch, args.dtype or ("bfloat16" if device == "cuda" else "float32"))
    about, top = machine(device), ceiling(device, dtype)
    print(f"{about['machine']}: copy {top.bandwidth / 1e9:.0f} GB/s, matrix product {top.flops / 1e12:.2f} TFLOP/s")
    print(library.describe_bodies(device), "\n")
    print("| operator | model | pass | provider | p20 ms | p50 ms | p80 ms | GB/s | TFLOP/s | share | peak MB |")
    print("|---|---|---|---|--:|--:|--:|--:|--:|--:|--:|")
    red = []
    for name in args.ops.split(","):
        operator = OPERATORS[name]
        for model in args.models.split(","):
            shape = ModelShape(**{**asdict(MODELS[model]), "batch": args.batch})
            functions = {p: provider(p, operator, device) for p in args.providers.split(",")}
            functions = {p: function for p, function in functions.items() if function is not None}
            for p in list(functions):
                error = disagreement(operator, functions[p], shape, Maker(dtype, device))
                if not error <= 1.0:
                    red.append(f"{name} {model} {p}: off by {error:.1f} times its tolerance, not timed")
                    del functions[p]
            figures = work(operator, shape, dtype)
            for which in PASSES[:1] if operator.in_place else args.passes.split(","):
                timed = measure(operator, shape, dtype, device, which, functions, args.rounds)
                size = sum(getattr(figures, f"{d}_bytes") for d in PASSES[:2] if which in (d, "both"))
                flops = sum(getattr(figures, f"{d}_flops") for d in PASSES[:2] if which in (d, "both"))
                for p, t in timed.items():
                    rate, work_rate = size / t["p50"] * 1e3, flops / t["p50"] * 1e3
                    row = {
                        "operator": name, "model": model, "batch": args.batch, "dtype": str(dtype), "pass": which,
                        "provider": p, "body": library.choose_body(device)[0] if p == "ours" else p,
                        "p20": t["p20"], "p50": t["p50"], "p80": t["p80"], "peak_bytes": t["peak"],
                        "gb_per_s": rate / 1e9, "tflop_per_s": work_rate / 1e12,
                        "share": max(rate / top.bandwidth, work_rate / top.flops), "ceiling": asdict(top), **about,
                    }  # fmt: skip
                    print(line(row), flush=True)
                    append(args.out, row)
    for message in red:
        print(f"RED {message}", file=sys.stderr)
    return 1 if red else 0


def _parser() -> argparse.ArgumentParser:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--ops", default=",".join(OPERATORS), help="operators, by comma")
    parser.add_argument("--models", default="XL", help="B,L,XL")
    parser.add_argument("--batch", type=int, default=64 if gpu else 1, help="images")
    parser.add_argument("--passes", default=",".join(PASSES))
    parser.add_argument("--providers", default=",".join(PROVIDERS if gpu else PROVIDERS[:2]))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if gpu else "cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="bfloat16 on a GPU, else float32")
    parser.add_argument("--rounds", type=int, default=100 if gpu else 10)
    parser.add_argument("--out", type=Path, default=RESULTS / "operators.jsonl")
    return parser


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    sys.exit(main())
