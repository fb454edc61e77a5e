"""Images per second of drawing with guidance on a CPU, by body of the operators.

    python benchmarks/sample.py [--config configs/digits.yaml] [--images 64] [--steps 50] [--guidance 1.5]
        [--bodies reference,native] [--rounds 5] [--out benchmarks/results/sample.jsonl]

The model of a configuration with fresh weights, two network evaluations a step. Bodies take turns, after one round to
warm up.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from machine import RESULTS, append, machine, seconds, spread
from pixelgen_kernels.bodies import forced
from tqdm import tqdm

from pixelgen_fast import config as cfg
from pixelgen_fast.models import build_model, model_schema
from pixelgen_fast.runs.draw import Generator


def fresh_generator(config: cfg.Config, device: str) -> Generator:
    """The model of a configuration with fresh weights, in the precision that a run on the device trains it in."""
    classes = [str(number) for number in range(config.data.num_classes or 10)]
    model = build_model(config, len(classes)).to(device, torch.bfloat16 if device == "cuda" else torch.float32)
    return Generator(model.eval(), config, classes, "raw", 0)


def seconds_by_body(
    generator: Generator, bodies: Sequence[str], images: int, steps: int, guidance: float, rounds: int
) -> dict[str, list[float]]:
    """Seconds of each round of drawing, which ends with the images in the host's memory; bodies take turns."""
    labels = torch.arange(images) % len(generator.classes)
    times: dict[str, list[float]] = {body: [] for body in bodies}
    for number in tqdm(range(rounds + 1), unit="round"):
        for body, values in times.items():
            with forced(body):
                elapsed = seconds(lambda: generator.draw(labels, steps=steps, guidance=guidance))
            if number:
                values.append(elapsed)
    return times


def main() -> int:
    args = _parser().parse_args()
    about = machine()
    generator = fresh_generator(cfg.load(args.config, [], model_schema), "cpu")
    times = seconds_by_body(
        generator, args.bodies.split(","), args.images, args.steps, args.guidance, args.rounds
    )  # fmt: skip
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
