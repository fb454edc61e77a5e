"""Time every operator of the registry against eager PyTorch, torch.compile and Liger-Kernel on this machine.

    python benchmarks/operators.py [--ops swiglu] [--models XL] [--batch 64] [--passes forward,backward,both]
        [--providers ours,eager,compile,liger,flash,xformers,sdpa] [--time-variants] [--device cuda] [--rounds 50]
        [--out benchmarks/results/operators.jsonl]

An operator is timed only after its outputs and gradients agree with its definition in float64, in every variant; a red
one is refused and the command exits with 1. Providers take turns, so that a drift of the clock meets all of them;
inputs are random and rotate through enough copies to leave the cache. On a GPU the device alone is timed (timing.py),
after a warm-up; on a CPU the wall clock, for the CPU body of each operator. Each row names machine, versions and commit
and is appended as JSONL. flash, xformers and sdpa are the backends of attention, forced one at a time.

GB/s and TFLOP/s are the operator's ideal bytes and FLOPs (registry.work) over the median; share = the larger of
both relative to what a copy and a matrix product reach here, measured at the start.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import math
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch._functorch.config
from machine import RESULTS, append, machine, spread
from pixelgen_kernels.agreement import relative_error, tolerance, worst
from pixelgen_kernels.attention import VARIABLE as ATTENTION
from pixelgen_kernels.attention import attention, attention_backend
from pixelgen_kernels.bodies import choose_body, describe_bodies
from pixelgen_kernels.registry import (
    OPERATORS,
    Inputs,
    Maker,
    Operator,
    Variant,
    differentiable,
    leaves,
    outputs,
    tensors,
    work,
)
from pixelgen_kernels.shapes import MODELS, ModelShape
from timing import Timer
from torch import Tensor

CACHE_BYTES = 256e6  # five times the L2 cache of an H100
PASSES = ("forward", "backward", "both")
BACKENDS = ("flash", "xformers", "sdpa")
PROVIDERS = ("ours", "eager", "compile", "liger", *BACKENDS)


@dataclass(frozen=True)
class Ceiling:
    """What this machine reaches: bytes per second of a copy, FLOP per second of a large matrix product."""

    bandwidth: float
    flops: float


def liger_swiglu(packed: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_swiglu as function

    return function(*packed.chunk(2, dim=-1))


def liger_norm_modulate(
    x_BLD: Tensor, norm_weight_D: Tensor, shift_BD: Tensor, scale_BD: Tensor, branch_BLD: Tensor, gate_BD: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from liger_kernel.transformers.functional import liger_modulated_rms_norm as function

    x_BLD = x_BLD + gate_BD[:, None] * branch_BLD
    return function(x_BLD, norm_weight_D, scale_BD, shift_BD, eps, 0.0, "llama", False), x_BLD


LIGER = {"swiglu": liger_swiglu, "norm_modulate": liger_norm_modulate}


class Absent(Exception):
    """A provider that has something for this operator is not there; the message says why."""


def cases(operator: Operator) -> dict[str, Operator]:
    """An operator and its variants, by case, each as an operator."""
    return {case: variant_of(operator, variant) for case, variant in operator.cases().items()}


def variant_of(operator: Operator, variant: Variant) -> Operator:
    def flowing(function: Callable[..., Any]) -> Callable[..., Any]:
        if variant.flowing is None:
            return function
        return lambda **inputs: tuple(outputs(function(**inputs))[i] for i in variant.flowing)

    return replace(
        operator,
        inputs=lambda shape, maker: operator.inputs(shape, maker) | variant.change,
        function=flowing(operator.function),
        definition=flowing(operator.definition),
        variants={},
    )


def provider(name: str, case: str, operator: Operator, device: str) -> Callable[..., Any] | None:
    """The function to time, or None where the provider has none for this operator. Raises Absent if it is missing."""
    if name == "ours":
        if choose_body(device)[0] == "reference":
            raise Absent(describe_bodies(device))
        return operator.function
    if name == "eager":
        return operator.definition
    if name == "compile":
        # backward alone repeats over one kept graph, so a compiled backward must not take over its buffers
        torch._functorch.config.donated_buffer = False
        return torch.compile(operator.definition, dynamic=False)
    if name == "liger":
        if case not in LIGER:
            return None
        if device != "cuda" or importlib.util.find_spec("liger_kernel") is None:
            raise Absent("liger-kernel is not installed, or has no GPU")
        return LIGER[case]
    return functools.partial(with_backend, name) if operator.name == "attention" else None


def with_backend(family: str, **inputs: Tensor) -> Tensor:
    with patch.dict(os.environ, {ATTENTION: family}):
        return attention(**inputs)


def backend_of(family: str, device: str, dtype: torch.dtype, head_dim: int) -> str:
    """What attention runs under a forced family. Raises Absent where that does not work."""
    with patch.dict(os.environ, {ATTENTION: family}):
        try:
            return attention_backend(device, dtype, head_dim)
        except ValueError as error:
            raise Absent(str(error)) from error


def disagreement(operator: Operator, function: Callable[..., Any], shape: ModelShape, maker: Maker) -> float:
    """Largest ||out - ref|| / ||ref|| over outputs and gradients, in units of what is tolerated; up to 1 is right.

    The reference is the definition in float64 on the same random inputs, two images of the shape. Tolerated is what
    the table of the operator and the dtype says, or four times the error of the definition itself in that dtype where
    a sum cancels. Infinite where either is not finite.
    """
    small = replace(shape.with_batch(2), parameters=4 * 1000)
    mine, eager, exact = (operator.inputs(small, Maker(maker.dtype, maker.device)) for _ in range(3))
    out = results(operator, function, mine, maker)
    plain = results(operator, operator.definition, eager, maker)
    ref = results(operator, operator.definition, _cast(exact, torch.float64), maker)

    def units(a: Tensor | None, b: Tensor | None, c: Tensor | None) -> float:
        if a is None or b is None or c is None:  # a gradient that does not flow
            return 0.0 if a is b is c else math.inf
        if not a.is_floating_point():
            return 0.0 if torch.equal(a, c) else math.inf
        error, own = relative_error(a, c), relative_error(b, c)
        tolerated = max(tolerance(operator.name, a.dtype), 4 * own)
        return error / tolerated if math.isfinite(error) and math.isfinite(tolerated) else math.inf

    return worst(units(*three) for three in zip(out, plain, ref, strict=True))


def results(operator: Operator, function: Callable[..., Any], inputs: Inputs, maker: Maker) -> list[Tensor | None]:
    """Outputs and gradients for the same random output gradients every time; changed tensors of one in place."""
    if operator.in_place:
        function(**inputs)
        return [x for name, x in tensors(inputs).items() if name not in operator.constant]
    wanted = leaves(operator, inputs)
    out = outputs(function(**inputs))
    if not wanted:
        return out
    cotangents = Maker(maker.dtype, maker.device, seed=1)
    flowing = [(x, cotangents.normal(*x.shape).to(x.dtype)) for x in out if x.requires_grad]
    found = torch.autograd.grad(
        [x for x, _ in flowing], list(wanted.values()), [dx for _, dx in flowing], allow_unused=True
    )
    return [x if x is None else x.detach() for x in (*out, *found)]


def _cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    def one(x: Any) -> Any:
        if isinstance(x, Tensor):
            return x.to(dtype) if x.is_floating_point() else x
        if isinstance(x, tuple):
            made = [one(y) for y in x]
            return type(x)(*made) if hasattr(x, "_fields") else tuple(made)
        return x

    return {name: one(x) for name, x in inputs.items()}


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
    flowing = [] if operator.in_place else differentiable(operator.definition(**first))
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
        result[name] = dict(zip(("p20", "p50", "p80"), spread(values), strict=True), peak=_peak(ready[name][0], device))
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
        f"| {row['case']} | {row['model']} | {row['pass']} | {row['provider']} "
        f"| {row['p20']:.3f} | {row['p50']:.3f} | {row['p80']:.3f} "
        f"| {row['gb_per_s']:.0f} | {row['tflop_per_s']:.2f} | {row['share']:.0%} | {peak} |"
    )


def benchmark(name: str, model: str, args: argparse.Namespace, top: Ceiling) -> Iterator[dict[str, Any]]:
    """Rows of one operator at one model: {"red": why} for a provider that is wrong, {"absent": why} for one that is
    not there, else the times of a pass."""
    device, dtype = args.device, dtype_of(args)
    shape = MODELS[model].with_batch(args.batch)
    for case, operator in cases(OPERATORS[name]).items():
        about = {"operator": name, "case": case, "model": model, "batch": args.batch, "dtype": str(dtype)}
        functions: dict[str, Callable[..., Any]] = {}
        bodies: dict[str, str] = {}
        timed = case == name or args.time_variants
        # a variant that is not timed is compared for ours alone: the others are no kernels of this project
        for p in args.providers.split(",") if timed else {"ours"} & set(args.providers.split(",")):
            try:
                if (function := provider(p, case, operator, device)) is None:
                    continue
                bodies[p] = choose_body(device)[0] if p == "ours" else p
                if p in BACKENDS:
                    bodies[p] = backend_of(p, device, dtype, shape.head_dim)
                functions[p] = function
            except Absent as why:
                yield about | {"provider": p, "absent": str(why)}
        for p in list(functions):
            error = disagreement(operator, functions[p], shape, Maker(dtype, device))
            if not error <= 1.0:
                del functions[p]
                yield about | {"provider": p, "red": f"off by {error:.1f} times its tolerance, not timed"}
        if not timed:
            continue
        figures = work(operator, shape, dtype)
        gradient = bool(leaves(operator, operator.inputs(shape, Maker(dtype, "meta"))))
        for which in args.passes.split(",") if gradient else PASSES[:1]:
            measured = measure(operator, shape, dtype, device, which, functions, args.rounds)
            size = sum(getattr(figures, f"{d}_bytes") for d in PASSES[:2] if which in (d, "both"))
            flops = sum(getattr(figures, f"{d}_flops") for d in PASSES[:2] if which in (d, "both"))
            for p, t in measured.items():
                rate, work_rate = size / t["p50"] * 1e3, flops / t["p50"] * 1e3
                yield about | {
                    "pass": which, "provider": p, "body": bodies[p], "p20": t["p20"], "p50": t["p50"], "p80": t["p80"],
                    "peak_bytes": t["peak"], "gb_per_s": rate / 1e9, "tflop_per_s": work_rate / 1e12,
                    "share": max(rate / top.bandwidth, work_rate / top.flops), "ceiling": asdict(top),
                }  # fmt: skip


def dtype_of(args: argparse.Namespace) -> torch.dtype:
    return getattr(torch, args.dtype or ("bfloat16" if args.device == "cuda" else "float32"))


def main() -> int:
    args = parser().parse_args()
    about, top = machine(args.device), ceiling(args.device, dtype_of(args))
    print(f"{about['machine']}: copy {top.bandwidth / 1e9:.0f} GB/s, matrix product {top.flops / 1e12:.2f} TFLOP/s")
    print(describe_bodies(args.device), "\n")
    print("| case | model | pass | provider | p20 ms | p50 ms | p80 ms | GB/s | TFLOP/s | share | peak MB |")
    print("|---|---|---|---|--:|--:|--:|--:|--:|--:|--:|")
    remarks = []
    for name in args.ops.split(","):
        for model in args.models.split(","):
            for row in benchmark(name, model, args, top):
                if "p50" in row:
                    print(line(row), flush=True)
                    append(args.out, row | about)
                else:
                    remarks.append(row)
    for row in remarks:
        word = "RED" if "red" in row else "not there:"
        print(f"{word} {row['case']} {row['model']} {row['provider']}: {row.get('red', row.get('absent'))}",
              file=sys.stderr)  # fmt: skip
    return 1 if any("red" in row for row in remarks) else 0


def parser() -> argparse.ArgumentParser:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--ops", default=",".join(OPERATORS), help="operators, by comma")
    parser.add_argument("--models", default="XL", help="by comma, of " + ", ".join(MODELS))
    parser.add_argument("--batch", type=int, default=64 if gpu else 1, help="images")
    parser.add_argument("--passes", default=",".join(PASSES))
    parser.add_argument("--providers", default=",".join(PROVIDERS if gpu else PROVIDERS[:2]))
    parser.add_argument("--time-variants", action="store_true", help="variants are compared always; time them too")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if gpu else "cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="bfloat16 on a GPU, else float32")
    parser.add_argument("--rounds", type=int, default=100 if gpu else 10)
    parser.add_argument("--out", type=Path, default=RESULTS / "operators.jsonl")
    return parser


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    sys.exit(main())
