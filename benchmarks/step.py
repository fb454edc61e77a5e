"""The trainer's whole step on a CPU, as a share of what the machine's matrix products reach.

    python benchmarks/step.py [--configs digits16,s32,m64] [--bodies reference,native] [--steps 15]
        [--out benchmarks/results/step.jsonl]

A step is what `Trainer.train_step` does: noising, forward, loss, backward, clipping, AdamW, averages, DeepSpeed's own
work; the images are in memory already. Bodies of the operators take turns step by step, after three steps to warm up.
share = model FLOPs of a step (2 per multiply-add of the matrix products, backward counted as twice forward) / time /
the best 2048^3 fp32 product, measured between the steps. saved: bytes per image kept from forward to backward.
The split is of extra steps under PyTorch's profiler, scaled to the median step; what no operator ran is "host":
Python, autograd and DeepSpeed.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
from machine import RESULTS, MatrixPeak, append, machine, seconds, spread
from pixelgen_kernels.library import VARIABLE
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from pixelgen_fast import config as cfg
from pixelgen_fast.engine import zero
from pixelgen_fast.engine.memory import keep_freed_memory
from pixelgen_fast.engine.metrics import forward_flops
from pixelgen_fast.engine.objective import FlowMatching
from pixelgen_fast.engine.optimizer import AdamWEMA
from pixelgen_fast.models import pixeldit

WARM_UP, PROFILED, CLASSES = 3, 3, 10


@dataclass(frozen=True)
class Case:
    """One configuration of the table: images of a step, their size, the model."""

    batch: int
    image: int
    model: pixeldit.Config


def _case(batch: int, image: int, patch: int, channels: int, heads: int, width: int, depth: int, pixels: int) -> Case:
    config = pixeldit.Config(
        hidden_size=width, num_heads=heads, patch_depth=depth, patch_size=patch, pixel_hidden_size=channels,
        pixel_depth=pixels,
    )  # fmt: skip
    return Case(batch, image, config)


CASES = {
    "digits16": _case(64, 16, 4, 8, 4, 96, 4, 2),
    "s32": _case(32, 32, 4, 16, 6, 192, 8, 2),
    "m64": _case(8, 64, 8, 16, 6, 384, 8, 3),
}
# what a profiled operator belongs to, first match
PARTS = (
    ("matrix products", ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")),
    ("attention", ("aten::_scaled_dot_product", "pixelgen_native::attention")),
    ("optimizer", ("pixelgen_native::adamw", "pixelgen_native::total_norm", "pixelgen::adamw", "aten::_fused_adamw",
                   "aten::lerp", "aten::_foreach", "aten::linalg_vector_norm")),
    ("our operators", ("pixelgen::", "pixelgen_native::")),
    ("other tensor operators", ("aten::",)),
)  # fmt: skip


class Step:
    """One configuration with one body of the operators: `step()` is a training step, as the trainer makes it."""

    def __init__(self, case: Case, body: str) -> None:
        self.body = body
        with self.chosen(), torch.random.fork_rng():
            torch.manual_seed(0)
            model = pixeldit.build(case.model, case.image, CLASSES)
            self.images = torch.randint(0, 256, (case.batch, case.image, case.image, 3), dtype=torch.uint8)
        self.labels, self.numbers = torch.arange(case.batch) % CLASSES, torch.arange(case.batch)
        module = FlowMatching(model, cfg.Objective(), 0, null_class=CLASSES)
        optimizer = AdamWEMA(module.parameters(), lr=1e-4, ema_decays=(0.9999,), clip_norm=1.0)
        self.engine = zero.ZeroEngine(module, optimizer, stage=1, micro_batch=case.batch)

    def chosen(self) -> patch.dict:
        return patch.dict(os.environ, {VARIABLE: self.body})

    def step(self) -> None:
        loss = self.engine(self.images, self.labels, self.numbers)
        self.engine.backward(loss)
        self.engine.step()

    def seconds(self) -> float:
        with self.chosen():
            return seconds(self.step)

    def split(self) -> dict[str, float]:
        """Share of each part of a profiled step."""
        with self.chosen(), profile(activities=[ProfilerActivity.CPU]) as trace:
            total = sum(seconds(self.step) for _ in range(PROFILED))
        parts: dict[str, float] = defaultdict(float)
        for event in trace.key_averages():
            name = next((part for part, starts in PARTS if event.key.startswith(starts)), None)
            if name:
                parts[name] += event.self_cpu_time_total / 1e6 / total
        return {name: parts[name] for name, _ in PARTS} | {"host": 1.0 - sum(parts.values())}

    def saved_bytes(self) -> int:
        """Bytes per image of the tensors that autograd keeps for backward, each storage once, weights left out."""
        weights = {p.untyped_storage()._cdata for p in self.engine.module.parameters()}
        kept: dict[int, torch.UntypedStorage] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in weights:
                kept[storage._cdata] = storage
            return tensor

        with self.chosen(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = self.engine.module(self.images, self.labels, self.numbers)
        size = sum(storage.nbytes() for storage in kept.values())
        del loss
        return size // len(self.images)


def main() -> int:
    args = _parser().parse_args()
    keep_freed_memory()
    zero.init_distributed("cpu")
    about, peak = machine(), MatrixPeak()
    peak.measure(6)
    rows = []
    for name in args.configs.split(","):
        case = CASES[name]
        with torch.device("meta"):
            flops = 3 * case.batch * forward_flops(pixeldit.build(case.model, case.image, CLASSES), case.image)
        steps = {body: Step(case, body) for body in args.bodies.split(",")}
        times: dict[str, list[float]] = {body: [] for body in steps}
        for number in tqdm(range(WARM_UP + args.steps), desc=name, unit="round"):
            for body, step in steps.items():
                elapsed = step.seconds()
                if number >= WARM_UP:
                    times[body].append(elapsed)
            peak.measure()
        for body, step in steps.items():
            low, median, high = spread(times[body])
            rows.append(
                {
                    "config": name, "body": body, "batch": case.batch, "flops_per_step": flops,
                    "p20": low, "p50": median, "p80": high, "images_per_s": case.batch / median,
                    "saved_bytes_per_image": step.saved_bytes(), "split": step.split(),
                }
            )  # fmt: skip
    best = peak.measure()
    print(f"\n{about['machine']}, torch {about['torch']}; 2048^3 fp32 product {best / 1e9:.0f} GFLOP/s")
    print("\n| config | body | ms a step, median (p20 to p80) | share of the product | images/s | saved kB/image |")
    print("|---|---|--:|--:|--:|--:|")
    for row in rows:
        row["peak_flops"], row["share"] = best, row["flops_per_step"] / row["p50"] / best
        print(
            f"| {row['config']} | {row['body']} | {row['p50'] * 1e3:.1f} ({row['p20'] * 1e3:.1f} to "
            f"{row['p80'] * 1e3:.1f}) | {row['share']:.0%} | {row['images_per_s']:.0f} "
            f"| {row['saved_bytes_per_image'] / 1e3:.0f} |"
        )
        append(args.out, row | about)
    parts = list(rows[0]["split"])
    print("\n| ms a step | body | " + " | ".join(parts) + " |\n|---|---|" + "--:|" * len(parts))
    for row in rows:
        cells = " | ".join(f"{row['split'][part] * row['p50'] * 1e3:.1f}" for part in parts)
        print(f"| {row['config']} | {row['body']} | {cells} |")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--configs", default=",".join(CASES), help=f"by comma, of {', '.join(CASES)}")
    parser.add_argument("--bodies", default="reference,native", help="by comma, of reference, native")
    parser.add_argument("--steps", type=int, default=15, help="timed steps of each body")
    parser.add_argument("--out", type=Path, default=RESULTS / "step.jsonl")
    return parser


if __name__ == "__main__":
    sys.exit(main())
