"""Images per second of drawing with guidance on a CPU, by body of the operators.

    python benchmarks/sample.py [--config configs/digits.yaml] [--images 64] [--steps 50] [--guidance 1.5]
        [--bodies reference,native] [--rounds 5] [--out benchmarks/results/sample.jsonl]

The model of a configuration with fresh weights, two network evaluations a step. Bodies take turns, after one round to
warm up.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from unittest.mock import patch

import torch
from machine import RESULTS, append, machine, seconds, spread
from pixelgen_kernels.library import VARIABLE
from tqdm import tqdm

from pixelgen_fast import config as cfg
from pixelgen_fast.engine.generator import Generator, build_model, model_schema


def main() -> int:
    args = _parser().parse_args()
    about = machine()
    config = cfg.load(args.config, [], model_schema)
    classes = [str(number) for number in range(config.data.num_classes or 10)]
    generator = Generator(build_model(config, len(classes)).eval(), config, classes, "raw", 0)
    labels = torch.arange(args.images) % len(classes)
    times: dict[str, list[float]] = {body: [] for body in args.bodies.split(",")}
    for number in tqdm(range(args.rounds + 1), unit="round"):
        for body, values in times.items():
            with patch.dict(os.environ, {VARIABLE: body}):
                elapsed = seconds(lambda: generator.draw(labels, steps=args.steps, guidance=args.guidance))
            if number:
                values.append(elapsed)
    base = spread(next(iter(times.values())))[1]
    print(f"\n{about['machine']}; {args.config}, {args.images} images, {args.steps} steps, guidance {args.guidance}\n")
    print(f"| body | images/s, median (p20 to p80) | times faster than {next(iter(times))} |\n|---|--:|--:|")
    for body, values in times.items():
        low, median, high = spread(values)
        rates = [args.images / t for t in (median, high, low)]
        print(f"| {body} | {rates[0]:.1f} ({rates[1]:.1f} to {rates[2]:.1f}) | {base / median:.2f} |")
        row = {"config": args.config, "images": args.images, "steps": args.steps, "guidance": args.guidance}
        append(args.out, row | {"body": body, "p20": low, "p50": median, "p80": high} | about)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--config", default="configs/digits.yaml")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=1.5)
    parser.add_argument("--bodies", default="reference,native", help="by comma")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS / "sample.jsonl")
    return parser


if __name__ == "__main__":
    sys.exit(main())
