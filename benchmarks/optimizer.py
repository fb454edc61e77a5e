"""One AdamW and EMA update with clipping on a CPU, against PyTorch's own, and against the memory's speed.

    python benchmarks/optimizer.py [--parameters 100000000] [--tensors 200] [--rounds 9]
        [--out benchmarks/results/optimizer.jsonl]

pytorch: torch.optim.AdamW(fused=True) after clip_grad_norm_, then a foreach average. reference: AdamWEMA on PyTorch's
operators. native: AdamWEMA on csrc. They take turns. Stream bandwidth is the best of ten triads a = b + s c over three
arrays of 256 MB; a step of AdamWEMA moves 40 bytes a parameter (the norm reads the gradient once more).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import torch
from machine import RESULTS, append, machine, seconds, spread
from pixelgen_kernels.bodies import VARIABLE
from torch import Tensor

from pixelgen_fast.engine.optimizer import AdamWEMA

CLIP, DECAY, BYTES = 1.0, 0.9999, 40


def stream() -> float:
    """Bytes per second of the best of ten triads."""
    a, b, c = (torch.ones(1 << 26) for _ in range(3))
    return 3 * a.nbytes / min(seconds(lambda: torch.add(b, c, alpha=3.0, out=a)) for _ in range(10))


def parameters(total: int, tensors: int) -> list[Tensor]:
    made = [torch.nn.Parameter(torch.randn(total // tensors)) for _ in range(tensors)]
    for p in made:
        p.grad = torch.randn_like(p) * 1e-2
    return made


def pytorch(params: list[Tensor]) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(params, lr=1e-4, fused=True)
    averages = [p.detach().clone() for p in params]

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(params, CLIP)
        optimizer.step()
        torch._foreach_lerp_(averages, [p.detach() for p in params], 1.0 - DECAY)

    return step


def ours(params: list[Tensor], body: str) -> Callable[[], None]:
    optimizer = AdamWEMA(params, lr=1e-4, ema_decays=(DECAY,), clip_norm=CLIP)

    def step() -> None:
        with patch.dict(os.environ, {VARIABLE: body}):
            optimizer.step()

    return step


def main() -> int:
    args = _parser().parse_args()
    about, bandwidth = machine(), stream()
    made = [parameters(args.parameters, args.tensors) for _ in range(3)]
    steps = {
        "pytorch": pytorch(made[0]), "reference": ours(made[1], "reference"), "native": ours(made[2], "native"),
    }  # fmt: skip
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(args.rounds + 1):
        for name, step in steps.items():
            elapsed = seconds(step)
            if number:
                times[name].append(elapsed)
    base = spread(times["pytorch"])[1]
    print(
        f"{about['machine']}; {args.parameters:,} parameters in {args.tensors} tensors; "
        f"triad {bandwidth / 1e9:.1f} GB/s\n"
    )
    print("| update | ms, median (p20 to p80) | times faster than pytorch | GB/s at 40 bytes | share of the triad |")
    print("|---|--:|--:|--:|--:|")
    for name, values in times.items():
        low, median, high = spread(values)
        rate = BYTES * args.parameters / median
        print(
            f"| {name} | {median * 1e3:.0f} ({low * 1e3:.0f} to {high * 1e3:.0f}) | {base / median:.2f} "
            f"| {rate / 1e9:.1f} | {rate / bandwidth:.0%} |"
        )
        row = {"update": name, "parameters": args.parameters, "tensors": args.tensors, "p20": low, "p50": median}
        append(args.out, row | {"p80": high, "ratio": base / median, "triad": bandwidth, **about})
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--parameters", type=int, default=100_000_000)
    parser.add_argument("--tensors", type=int, default=200, help="how many parameters share them")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=RESULTS / "optimizer.jsonl")
    return parser


if __name__ == "__main__":
    sys.exit(main())
