"""The trainer's whole step on a CPU, as a share of what the machine's matrix products reach.

    python benchmarks/step.py [--configs digits16,s32,m64] [--bodies reference,native] [--peers eager,compiled]
        [--steps 15] [--out benchmarks/results/step.jsonl]

A step is what `Trainer.train_step` does: noising, forward, loss, backward, clipping, AdamW, averages, DeepSpeed's own
work; the images are in memory already. Bodies of the operators take turns step by step, after three steps to warm up;
peers (peers.py), the same model in plain PyTorch without DeepSpeed, take turns with them. `starts` is the first step of
each, which compiles where something is compiled; torch.compile's caches are off.
share = model FLOPs of a step (2 per multiply-add of the matrix products, backward counted as twice forward) / time /
the best 2048^3 fp32 product, measured between the steps. saved: bytes per image kept from forward to backward.
The split is of extra steps under PyTorch's profiler, scaled to the median step; what no operator ran is "host":
Python, autograd and DeepSpeed; of the compiled peer, whose kernels the profiler does not name, those too.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
from machine import RESULTS, append, machine, seconds, spread
from peers import Peer
from pixelgen_kernels.bodies import forced
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm
from training import Training

from pixelgen_fast import config as cfg
from pixelgen_fast.engine import zero
from pixelgen_fast.engine.ceilings import MatrixPeak
from pixelgen_fast.engine.memory import keep_freed_memory
from pixelgen_fast.models import pixeldit

WARM_UP, PROFILED, CLASSES = 3, 3, 10


def _case(
    batch: int, image: int, patch: int, channels: int, heads: int, width: int, depth: int, pixels: int
) -> cfg.Config:
    model = pixeldit.Settings(
        hidden_size=width, num_heads=heads, patch_depth=depth, patch_size=patch, pixel_hidden_size=channels,
        pixel_depth=pixels,
    )  # fmt: skip
    return cfg.Config(
        model=model,
        data=cfg.Data(image_size=image, num_classes=CLASSES),
        train=cfg.Train(global_batch=batch, micro_batch=batch),
    )


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


def split(training: Training | Peer) -> dict[str, float]:
    """Share of each part of a profiled step."""
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        total = sum(seconds(training.step) for _ in range(PROFILED))
    parts: dict[str, float] = defaultdict(float)
    for event in trace.key_averages():
        name = next((part for part, starts in PARTS if event.key.startswith(starts)), None)
        if name:
            parts[name] += event.self_cpu_time_total / 1e6 / total
    return {name: parts[name] for name, _ in PARTS} | {"host": 1.0 - sum(parts.values())}


def saved_bytes(training: Training | Peer) -> int:
    """Bytes per image of the tensors that autograd keeps for backward, each storage once, weights left out."""
    weights = {p.untyped_storage()._cdata for p in training.module.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage
        return tensor

    with forced(training.body), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = training.module(training.images, training.labels, training.numbers)
    size = sum(storage.nbytes() for storage in kept.values())
    del loss
    return size // len(training.images)


def words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def measure(name: str, bodies: list[str], others: list[str], steps: int, peak: MatrixPeak) -> list[dict[str, Any]]:
    """A row for each body and peer; ratios are of the times of one turn, to the last body."""
    sides: dict[str, Training | Peer] = {body: Training(CASES[name], "cpu", body) for body in bodies}
    flops = sides[bodies[-1]].flops
    sides |= {peer: Peer(CASES[name], peer) for peer in others}
    times: dict[str, list[float]] = {side: [] for side in sides}
    for _ in tqdm(range(WARM_UP + steps), desc=name, unit="round"):
        for side, training in sides.items():
            times[side].append(seconds(training.step))
        peak.measure()
    rows = []
    for side, training in sides.items():
        timed = times[side][WARM_UP:]
        low, median, high = spread(timed)
        ratios = [a / b for a, b in zip(timed, times[bodies[-1]][WARM_UP:], strict=True)]
        rows.append(
            {
                "config": name, "body": side, "batch": len(training.images), "flops_per_step": flops,
                "p20": low, "p50": median, "p80": high, "starts": times[side][0], "times_as_long": spread(ratios),
                "images_per_s": len(training.images) / median, "saved_bytes_per_image": saved_bytes(training),
                "split": split(training),
            }
        )  # fmt: skip
    return rows


def main() -> int:
    args = _parser().parse_args()
    bodies = words(args.bodies)
    torch.compiler.config.force_disable_caches = True  # a start is the one that a new machine has
    keep_freed_memory()
    zero.init_distributed("cpu")
    about, peak = machine(), MatrixPeak()
    peak.measure(6)
    rows = [row for name in words(args.configs) for row in measure(name, bodies, words(args.peers), args.steps, peak)]
    best = peak.measure()
    print(f"\n{about['machine']}, torch {about['torch']}; 2048^3 fp32 product {best / 1e9:.0f} GFLOP/s; p20 to p80\n")
    print(f"| config | body | ms a step | share of the product | times {bodies[-1]} | first step, s | saved kB/image |")
    print("|---|---|--:|--:|--:|--:|--:|")
    for row in rows:
        row["peak_flops"], row["share"] = best, row["flops_per_step"] / row["p50"] / best
        low, ratio, high = row["times_as_long"]
        print(
            f"| {row['config']} | {row['body']} | {row['p50'] * 1e3:.1f} ({row['p20'] * 1e3:.1f} to "
            f"{row['p80'] * 1e3:.1f}) | {row['share']:.0%} | {ratio:.2f} ({low:.2f} to {high:.2f}) "
            f"| {row['starts']:.1f} | {row['saved_bytes_per_image'] / 1e3:.0f} |"
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
    parser.add_argument("--peers", default="", help="beside them, by comma, of eager, compiled")
    parser.add_argument("--steps", type=int, default=15, help="timed steps of each body")
    parser.add_argument("--out", type=Path, default=RESULTS / "step.jsonl")
    return parser


if __name__ == "__main__":
    sys.exit(main())
