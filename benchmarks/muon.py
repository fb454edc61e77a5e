"""What Muon costs: the trainer's whole step with it and with AdamW alone, taking turns, one rank.

    python benchmarks/muon.py [--configs digits] [--images 64] [--steps 60] [--device cpu] [--out FILE]

The step is that of benchmarks/training.py. Its spread is of the steps, the ratio is the median over the turns.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

if "cpu" in sys.argv or "--device" not in sys.argv:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
from machine import RESULTS, append, machine, seconds, spread
from pixelgen_kernels.bodies import choose_body
from training import Training, load_config

NAMES, WARM_UP = ("adamw", "muon"), 3


def measure(config: str, images: int, steps: int, device: str) -> dict[str, list[float]]:
    """Seconds of each step, by the optimizer's name."""
    body, _ = choose_body(device)
    sides = {name: Training(load_config(config, images, f"optimizer.name={name}"), device, body) for name in NAMES}
    times: dict[str, list[float]] = {name: [] for name in NAMES}
    for number in range(WARM_UP + steps):
        for name, side in sides.items():
            elapsed = seconds(lambda side=side: (side.step(), torch.cuda.synchronize() if device == "cuda" else None))
            if number >= WARM_UP:
                times[name].append(elapsed)
    return times


def main() -> int:
    args = _parser().parse_args()
    about = machine(args.device)
    print(f"{about['machine']}\n\n| images | AdamW: ms a step (20th to 80th percentile) | Muon | times AdamW's |")
    print("|---|--:|--:|--:|")
    for config in args.configs.split(","):
        times = measure(config, args.images, args.steps, args.device)
        low, ratio, high = spread(b / a for a, b in zip(*times.values(), strict=True))
        cells = ["{1:.1f} ({0:.1f} to {2:.1f})".format(*(1e3 * t for t in spread(times[name]))) for name in NAMES]
        print(f"| {args.images} of {config} | {' | '.join(cells)} | {ratio:.2f} ({low:.2f} to {high:.2f}) |")
        append(args.out, {"config": config, "images": args.images, "ratio": ratio, "times": times, **about})
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--configs", default="digits", help="names in configs/, joined by commas")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, default=RESULTS / "muon.jsonl")
    return parser


if __name__ == "__main__":
    sys.exit(main())
