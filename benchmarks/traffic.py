"""What one training step of a model must move and start, counted from its traced graph on the meta device.

    python benchmarks/traffic.py [--model XL] [--batch 64] [--bodies reference,triton] [--rates ceilings,best]
        [--top 12] [--json FILE]

Every operation that PyTorch dispatches in forward and backward counts as pixelgen_fast/planning/trace.py has it, at the
times of the committed report for launches of ours; one that is not in the report's list is named, and the exit code is
1. Saved bytes are the storages that autograd keeps between forward and backward, weights left out.

Rates: "ceilings" are the report's, "best" the best that anybody has measured in public for a training block on an H100.
A kernel of ours gets slower with what binds it; instructions take the same time at either.

Bodies: "reference" has its RMSNorms written out, as the public code has; "fused_norms" is the reference with
PyTorch's own fused RMSNorm; "triton" has our kernels, and "recompute" has them with pixel_attention keeping nothing
but its inputs. Modelled, not measured: caches, overlap, launch gaps and the work of the optimizer and of ZeRO are
outside; an operation of PyTorch counts as one kernel.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from pixelgen_kernels.report.command import BASELINE
from pixelgen_kernels.report.gpu import H100
from pixelgen_kernels.shapes import MODELS, ModelShape
from torch import Tensor

from pixelgen_fast.layers import Noising
from pixelgen_fast.models import pixeldit
from pixelgen_fast.planning.gpu_kernels import gpu_kernels
from pixelgen_fast.planning.rates import Rates
from pixelgen_fast.planning.trace import Operation, Phase, Recorder, Trace, modelled

BODIES = ("reference", "fused_norms", "triton", "recompute")
RATES = {"ceilings": Rates(H100.tensor_rate, H100.bandwidth), "best": Rates(630e12, 2.8e12)}
DATA_SHEET = 989e12  # dense bf16 of an H100 SXM


@dataclass
class Step(Trace):
    """One forward and backward of a body.

    saved: bytes kept between the two; saved_as: the same, and how many tensors, by dtype and shape.
    """

    body: str = ""
    saved: int = 0
    saved_as: dict[str, tuple[int, int]] = field(default_factory=dict)

    def images_per_second(self, rates: Rates) -> float:
        return self.batch / self.seconds(rates)

    def share(self, rates: Rates) -> float:
        """FLOPs of the model, three times those of its forward pass, as a share of the data sheet's rate."""
        return 3 * self.total("flops", "forward") / self.seconds(rates) / DATA_SHEET


@dataclass
class Count:
    """Sums over the operations of one kind. seconds: by name of the rates."""

    calls: int = 0
    kernels: int = 0
    bytes: int = 0
    flops: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))


def counts(operations: Iterable[Operation]) -> dict[str, Count]:
    """The operations by their names."""
    found: dict[str, Count] = defaultdict(Count)
    for op in operations:
        count = found[op.name]
        count.calls += 1
        count.kernels += op.kernels
        count.bytes += op.bytes
        count.flops += op.flops
        for name, rates in RATES.items():
            count.seconds[name] += op.seconds(rates)
    return found


@contextmanager
def saved_bytes(parameters: set[int]) -> Iterator[dict[int, tuple[Tensor, int]]]:
    """Collect what autograd saves, by storage; parameters: storages that do not count."""
    kept: dict[int, tuple[Tensor, int]] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in parameters:
            kept[storage._cdata] = (x, storage.nbytes())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        yield kept


def build(shape: ModelShape, body: str) -> pixeldit.PixelDiT:
    """PixelDiT of a shape on the meta device for one of BODIES: bf16 weights and streams, float32 tables."""
    config = pixeldit.Settings(
        hidden_size=shape.width,
        num_heads=shape.heads,
        patch_depth=shape.depth,
        pixel_depth=shape.pixel_depth,
        patch_size=shape.patch,
        pixel_hidden_size=shape.channels,
        pixel_attention_save="recompute" if body == "recompute" else "store",
    )
    with torch.device("meta"):
        return pixeldit.build(config, shape.image, 1000).bfloat16()


def trace(shape: ModelShape, body: str, baseline: Path = BASELINE) -> Step:
    """Trace forward, loss and backward of a model on the meta device with one of BODIES."""
    model = build(shape, body)
    with torch.device("meta"):
        images = torch.empty(shape.batch, shape.image, shape.image, 3, dtype=torch.uint8)
        y, numbers = (torch.empty(shape.batch, dtype=torch.int64) for _ in range(2))
        t, weight = torch.empty(shape.batch), torch.empty(shape.batch)
    noising = Noising(numbers, t, seed=0, noise_scale=1.0)
    result, ours = Step(shape.batch, body=body), modelled([MODELS[shape.name]], baseline)
    parameters = {p.untyped_storage()._cdata for p in model.parameters()}
    forced = {"PIXELGEN_OPS": "triton" if body in ("triton", "recompute") else "reference"}
    with patch.dict(os.environ, forced), gpu_kernels(fused_norms=body == "fused_norms"):
        with saved_bytes(parameters) as kept, Recorder(result, ours, in_phase("forward")):
            loss = model.velocity_loss(images, y, noising, weight).mean()
        for x, size in kept.values():
            kind = f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}"
            number, total = result.saved_as.get(kind, (0, 0))
            result.saved_as[kind] = (number + 1, total + size)
        result.saved = sum(size for _, size in kept.values())
        with Recorder(result, ours, in_phase("backward")):
            loss.backward()
    return result


def in_phase(phase: Phase) -> Any:
    """What a Recorder asks where nothing is told apart but the phase."""
    return lambda: ("", phase)


def summary(traces: list[Step], rates: list[str]) -> str:
    """One row a body, as a Markdown table; for each of the rates time, images/s and share of the data sheet's rate."""
    head = [
        "body", "forward MB/image", "backward MB/image", "total GB/image", "saved MB/image", "GFLOP/image",
        "kernels/step",
    ]  # fmt: skip
    for name in rates:
        head += [f"{name}: us/image", f"{name}: images/s", f"{name}: of 989 TFLOP/s"]
    lines = [f"| {' | '.join(head)} |", f"|---{'|--:' * (len(head) - 1)}|"]
    for t in traces:
        one = 1.0 / t.batch
        cells = [
            t.body, f"{t.total('bytes', 'forward') * one / 1e6:.0f}",
            f"{t.total('bytes', 'backward') * one / 1e6:.0f}", f"{t.total('bytes') * one / 1e9:.2f}",
            f"{t.saved * one / 1e6:.0f}", f"{t.total('flops') * one / 1e9:.2f}", f"{t.total('kernels')}",
        ]  # fmt: skip
        for name in rates:
            at = RATES[name]
            cells += [f"{t.seconds(at) * one * 1e6:.0f}", f"{t.images_per_second(at):.0f}", f"{t.share(at):.0%}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def details(t: Step, top: int, rates: str) -> str:
    """The operations that move most and the tensors that stay, as Markdown tables. rates: of the times."""
    rows = [(phase, op, c) for phase in ("forward", "backward") for op, c in of_phase(t, phase).items()]
    rows.sort(key=lambda row: -row[2].bytes)
    lines = [f"\n{t.body}", "", "| pass | operation | calls | kernels | MB/image | GFLOP/image | us/image |",
             "|---|---|--:|--:|--:|--:|--:|"]  # fmt: skip
    for phase, op, c in rows[:top]:
        per = t.batch
        lines.append(
            f"| {phase} | {op} | {c.calls} | {c.kernels} | {c.bytes / per / 1e6:.1f} | {c.flops / per / 1e9:.2f} "
            f"| {c.seconds[rates] / per * 1e6:.1f} |"
        )
    lines += ["", "| saved for backward | tensors | MB/image |", "|---|--:|--:|"]
    for kind, (number, size) in sorted(t.saved_as.items(), key=lambda item: -item[1][1])[:top]:
        lines.append(f"| {kind} | {number} | {size / t.batch / 1e6:.1f} |")
    return "\n".join(lines)


def of_phase(t: Step, phase: Phase) -> dict[str, Count]:
    """The operations of a phase by their names."""
    return counts(op for op in t.operations if op.phase == phase)


def as_json(t: Step) -> dict[str, Any]:
    """The trace as plain data."""
    plain = {key: value for key, value in vars(t).items() if key != "operations"}
    passes = {name: {op: vars(c) for op, c in of_phase(t, name).items()} for name in ("forward", "backward")}
    return plain | passes | {"unlisted": sorted(t.unlisted)}


def main() -> int:
    models = [name for name, shape in MODELS.items() if shape.pixel_depth]
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", choices=models, default="XL")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--bodies", default=",".join(BODIES), help="bodies, by comma")
    parser.add_argument("--rates", default=",".join(RATES), help=f"rates, by comma, of {', '.join(RATES)}")
    parser.add_argument("--top", type=int, default=12, help="operations to list for each body")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    rates = args.rates.split(",")
    if unknown := set(rates) - set(RATES):
        parser.error(f"--rates {', '.join(sorted(unknown))}: use some of {', '.join(RATES)}")
    shape = MODELS[args.model].with_batch(args.batch)
    traces = [trace(shape, body) for body in args.bodies.split(",")]
    print(f"PixelDiT-{args.model}, {shape.image} px, {shape.batch} images, bf16; modelled for {H100.name}")
    for name in rates:
        print(f"  {name}: {RATES[name].products / 1e12:.0f} TFLOP/s, {RATES[name].memory / 1e12:.1f} TB/s")
    if args.batch != 64:
        print("  the report's times are for 64 images: here those of our kernels are scaled by the bytes they move")
    print(f"\n{summary(traces, rates)}")
    for t in traces:
        print(details(t, args.top, rates[0]))
    if args.json:
        args.json.write_text(json.dumps([as_json(t) for t in traces], indent=1) + "\n")
    unlisted = sorted(set().union(*(t.unlisted for t in traces)))
    for launch in unlisted:
        print(f"NOT IN THE REPORT: a step starts {launch}, which no case of {args.model} lists", file=sys.stderr)
    return 1 if unlisted else 0


if __name__ == "__main__":
    sys.exit(main())
