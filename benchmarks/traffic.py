"""What one training step of a model must move and start, counted from its traced graph on the meta device.

    python benchmarks/traffic.py [--model XL] [--batch 64] [--bodies reference,triton] [--rates ceilings,best]
        [--top 12] [--json FILE]

Every operation that PyTorch dispatches in forward and backward is one row: bytes = its input and output tensors, each
once (views move nothing), FLOPs by PyTorch's formulas, time = max(FLOP / matrix rate, bytes / bandwidth). For ours, the
launches are recorded on the very arguments, and their times are those of the committed report, which knows their
instructions; a launch that is not in the report's list is named, and the exit code is 1. Saved bytes are the storages
that autograd keeps between forward and backward, weights left out.

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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from pixelgen_kernels.launch import Started, recording
from pixelgen_kernels.registration import LAUNCHERS, NAMESPACE
from pixelgen_kernels.registry import OPERATORS
from pixelgen_kernels.report.command import BASELINE
from pixelgen_kernels.report.gpu import H100
from pixelgen_kernels.report.listing import listed
from pixelgen_kernels.report.rules import read_baseline
from pixelgen_kernels.shapes import MODELS, ModelShape
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from pixelgen_fast.layers import Noising
from pixelgen_fast.models import pixeldit

BODIES = ("reference", "fused_norms", "triton", "recompute")
ALLOCATIONS = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"}
OVERWRITES = {"fill_", "zero_", "copy_", "normal_", "random_"}


@dataclass(frozen=True)
class Rates:
    """FLOP/s of matrix products and bytes/s of memory."""

    products: float
    memory: float

    def time(self, flops: float, moved: float) -> float:
        return max(flops / self.products, moved / self.memory)

    def time_of(self, limits: Mapping[str, float]) -> float:
        """Seconds of a kernel from its modelled microseconds by limit, which are those at the report's ceilings."""
        slower = {"tensor": H100.tensor_rate / self.products, "memory": H100.bandwidth / self.memory}
        return max(us * slower.get(limit, 1.0) for limit, us in limits.items()) * 1e-6


RATES = {"ceilings": Rates(H100.tensor_rate, H100.bandwidth), "best": Rates(630e12, 2.8e12)}
DATA_SHEET = 989e12  # dense bf16 of an H100 SXM


@dataclass
class Count:
    """Sums over the operations of one kind. seconds: by name of the rates."""

    calls: int = 0
    kernels: int = 0
    bytes: int = 0
    flops: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))


@dataclass
class Trace:
    """One forward and backward.

    forward and backward: operation -> Count. saved: bytes kept between the two; saved_as: the same, and how many
    tensors, by dtype and shape. unlisted: launches of ours that the report does not list.
    """

    body: str
    batch: int
    forward: dict[str, Count] = field(default_factory=lambda: defaultdict(Count))
    backward: dict[str, Count] = field(default_factory=lambda: defaultdict(Count))
    saved: int = 0
    saved_as: dict[str, tuple[int, int]] = field(default_factory=dict)
    unlisted: set[str] = field(default_factory=set)

    def total(self, of: str, passes: tuple[str, ...] = ("forward", "backward")) -> float:
        return sum(getattr(count, of) for name in passes for count in getattr(self, name).values())

    def seconds(self, rates: str) -> float:
        return sum(count.seconds[rates] for found in (self.forward, self.backward) for count in found.values())

    def images_per_second(self, rates: str) -> float:
        return self.batch / self.seconds(rates)

    def share(self, rates: str) -> float:
        """FLOPs of the model, three times those of its forward pass, as a share of the data sheet's rate."""
        return 3 * self.total("flops", ("forward",)) / self.seconds(rates) / DATA_SHEET


@dataclass
class Modelled:
    """The report's list of a model by Triton's key: modelled microseconds by limit, where the launch is as large."""

    limits: dict[tuple[Any, ...], tuple[Started, Mapping[str, float]]] = field(default_factory=dict)

    def of(self, started: Started) -> tuple[bool, Mapping[str, float] | None]:
        """(listed, its limits): None for a launch that is not listed, or listed for another batch."""
        if started.key not in self.limits:
            return False, None
        same, limits = self.limits[started.key]
        as_large = (started.launch.grid, started.launch.bytes_moved) == (same.launch.grid, same.launch.bytes_moved)
        return True, limits if as_large else None


def modelled(shape: ModelShape, baseline: Path) -> Modelled:
    """Times of the committed report for a model. Raises ValueError when the baseline is not that of this version."""
    times = read_baseline(baseline)
    found = listed(OPERATORS, [MODELS[shape.name]])
    if absent := [item.key for item in found if item.key not in times]:
        raise ValueError(f"{baseline} lacks {', '.join(absent)}; pixelgen kernels report --update-baseline writes it")
    return Modelled({item.started.key: (item.started, times[item.key]) for item in found})


class Recorder(TorchDispatchMode):
    """Adds every operation that is dispatched to `into`, and what the report does not list to `unlisted`."""

    def __init__(self, into: dict[str, Count], ours: Modelled, unlisted: set[str]) -> None:
        super().__init__()
        self.into, self.ours, self.unlisted = into, ours, unlisted

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func._schema.name.split("::")[1]
        read = _storages(x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor))
        results = _storages(x for x in tree_leaves(out) if isinstance(x, Tensor))
        written = {k: n for k, n in results.items() if k not in read or func._schema.is_mutable}
        if not written or name in ALLOCATIONS:
            return out
        if name in OVERWRITES:
            read = {k: n for k, n in read.items() if k not in written}
        count = self.into[name]
        flops = flop_registry[func.overloadpacket](*args, **kwargs, out_val=out) if _has_flops(func) else 0
        moved = sum(read.values()) + sum(written.values())
        started = self.launches(func, args, kwargs)
        count.calls += 1
        count.kernels += len(started) or 1
        count.bytes += moved
        count.flops += flops
        for rates, rate in RATES.items():
            # without a modelled time, the tensors alone say how long it takes
            ours = sum(rate.time_of(limits) for limits in started if limits is not None)
            count.seconds[rates] += max(rate.time(flops, moved), ours)
        return out

    def launches(self, func: Any, args: Any, kwargs: Any) -> list[Mapping[str, float] | None]:
        """What an operation of ours starts on these arguments: the modelled limits of each launch, None for unknown."""
        if func.namespace != NAMESPACE:
            return []
        name = func._schema.name.split("::")[1]
        with recording() as started:
            LAUNCHERS[name](*args, **kwargs)
        found = []
        for launch in started:
            known, limits = self.ours.of(launch)
            if not known:
                self.unlisted.add(f"{name}: {launch.launch.name}")
            found.append(limits)
        return found


class GpuKernels(TorchFunctionMode):
    """Attention and, where asked, RMSNorm as the one kernel that they are on a GPU; the meta device spells them out."""

    def __init__(self, fused_norms: bool) -> None:
        super().__init__()
        self.fused_norms = fused_norms

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return torch.ops.aten._scaled_dot_product_flash_attention(*args)[0]
        if func is F.rms_norm and self.fused_norms:
            return torch.ops.traffic.rms_norm(args[0], kwargs["weight"])[0]
        return func(*args, **kwargs)


@torch.library.custom_op("traffic::rms_norm", mutates_args=())
def _rms_norm(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(x.shape[:-1])


@torch.library.custom_op("traffic::rms_norm_backward", mutates_args=())
def _rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, output[1])


_rms_norm.register_fake(_rms_norm._init_fn)
_rms_norm_backward.register_fake(_rms_norm_backward._init_fn)
_rms_norm.register_autograd(
    lambda ctx, dy, dr: torch.ops.traffic.rms_norm_backward(dy, *ctx.saved_tensors), setup_context=_save
)


def _has_flops(func: Any) -> bool:
    return func.overloadpacket in flop_registry


def _storages(tensors: Iterator[Tensor]) -> dict[int, int]:
    """Bytes of each storage that the tensors touch, at most its size: an expanded tensor is read once."""
    found: dict[int, int] = defaultdict(int)
    size = {}
    for x in tensors:
        storage = x.untyped_storage()
        size[storage._cdata] = storage.nbytes()
        found[storage._cdata] += x.numel() * x.element_size()
    return {k: min(n, size[k]) for k, n in found.items()}


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


def trace(shape: ModelShape, body: str, baseline: Path = BASELINE) -> Trace:
    """Trace forward, loss and backward of a model on the meta device with one of BODIES."""
    model = build(shape, body)
    with torch.device("meta"):
        images = torch.empty(shape.batch, shape.image, shape.image, 3, dtype=torch.uint8)
        y, numbers = (torch.empty(shape.batch, dtype=torch.int64) for _ in range(2))
        t, weight = torch.empty(shape.batch), torch.empty(shape.batch)
    noising = Noising(numbers, t, seed=0, noise_scale=1.0)
    result, ours = Trace(body, shape.batch), modelled(shape, baseline)
    parameters = {p.untyped_storage()._cdata for p in model.parameters()}
    forced = {"PIXELGEN_OPS": "triton" if body in ("triton", "recompute") else "reference"}
    with patch.dict(os.environ, forced), GpuKernels(fused_norms=body == "fused_norms"):
        with saved_bytes(parameters) as kept, Recorder(result.forward, ours, result.unlisted):
            loss = model.velocity_loss(images, y, noising, weight).mean()
        for x, size in kept.values():
            kind = f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}"
            number, total = result.saved_as.get(kind, (0, 0))
            result.saved_as[kind] = (number + 1, total + size)
        result.saved = sum(size for _, size in kept.values())
        with Recorder(result.backward, ours, result.unlisted):
            loss.backward()
    return result


def summary(traces: list[Trace], rates: list[str]) -> str:
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
            t.body, f"{t.total('bytes', ('forward',)) * one / 1e6:.0f}",
            f"{t.total('bytes', ('backward',)) * one / 1e6:.0f}", f"{t.total('bytes') * one / 1e9:.2f}",
            f"{t.saved * one / 1e6:.0f}", f"{t.total('flops') * one / 1e9:.2f}", f"{t.total('kernels')}",
        ]  # fmt: skip
        for name in rates:
            cells += [f"{t.seconds(name) * one * 1e6:.0f}", f"{t.images_per_second(name):.0f}", f"{t.share(name):.0%}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def details(t: Trace, top: int, rates: str) -> str:
    """The operations that move most and the tensors that stay, as Markdown tables. rates: of the times."""
    rows = [(phase, op, c) for phase in ("forward", "backward") for op, c in getattr(t, phase).items()]
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


def as_json(t: Trace) -> dict[str, Any]:
    """The trace as plain data."""
    passes = {name: {op: vars(count) for op, count in getattr(t, name).items()} for name in ("forward", "backward")}
    return vars(t) | passes | {"unlisted": sorted(t.unlisted)}


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
        print("  the report's times are for 64 images: here our kernels are counted by their tensors alone")
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
