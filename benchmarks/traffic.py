"""What one training step of a model must move and start, counted from its traced graph on the meta device.

    python benchmarks/traffic.py [--model XL] [--batch 64] [--bodies reference,triton] [--top 12]
        [--json FILE]

Every operation that PyTorch dispatches in forward and backward is one row: bytes = its input and output tensors, each
once (views move nothing), FLOPs by PyTorch's formulas, time = max(FLOP / 798 TFLOP/s, bytes / 3.0 TB/s), or for our
kernels the modelled times of the committed report, which know their instructions. Saved bytes are the storages that
autograd keeps between forward and backward, weights left out.

Bodies: "reference" has its RMSNorms written out, as the public code has; "fused_norms" is the reference with
PyTorch's own fused RMSNorm; "triton" has our kernels, and "recompute" has them with pixel_attention keeping nothing
but its inputs. Modelled, not measured: caches, overlap, launch gaps and the work of the optimizer and of ZeRO are
outside; an operation of PyTorch counts as one kernel.
"""

from __future__ import annotations

import argparse
import json
import os
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from pixelgen_kernels.device import H100
from pixelgen_kernels.launch import MODELS, ModelShape
from pixelgen_kernels.registry import OPERATORS
from pixelgen_kernels.report import BASELINE
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from pixelgen_fast.models import pixeldit
from pixelgen_fast.models.layers import Noising

BODIES = ("reference", "fused_norms", "triton", "recompute")
ALLOCATIONS = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"}
OVERWRITES = {"fill_", "zero_", "copy_", "normal_", "random_"}


@dataclass
class Count:
    """Sums over the operations of one kind."""

    calls: int = 0
    kernels: int = 0
    bytes: int = 0
    flops: int = 0
    seconds: float = 0.0


@dataclass
class Trace:
    """One forward and backward.

    forward and backward: operation -> Count. saved: bytes kept between the two; saved_as: the same, and how many
    tensors, by dtype and shape.
    """

    body: str
    batch: int
    forward: dict[str, Count] = field(default_factory=lambda: defaultdict(Count))
    backward: dict[str, Count] = field(default_factory=lambda: defaultdict(Count))
    saved: int = 0
    saved_as: dict[str, tuple[int, int]] = field(default_factory=dict)

    def total(self, of: str, passes: tuple[str, ...] = ("forward", "backward")) -> float:
        return sum(getattr(count, of) for name in passes for count in getattr(self, name).values())


class Recorder(TorchDispatchMode):
    """Adds every operation that is dispatched to `into`."""

    def __init__(self, into: dict[str, Count], kernels: dict[str, tuple[int, float]]) -> None:
        super().__init__()
        self.into, self.kernels = into, kernels

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
        count, kernels = self.into[name], 1
        flops = flop_registry[func.overloadpacket](*args, **kwargs, out_val=out) if _has_flops(func) else 0
        moved = sum(read.values()) + sum(written.values())
        seconds = max(flops / H100.tensor_rate, moved / H100.bandwidth)
        if func.namespace == "pixelgen":
            kernels, modelled = self.kernels.get(name, (1, 0.0))
            seconds = max(seconds, modelled)
        count.calls += 1
        count.kernels += kernels
        count.bytes += moved
        count.flops += flops
        count.seconds += seconds
        return out


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


def kernel_table(shape: ModelShape, baseline: Path) -> dict[str, tuple[int, float]]:
    """(kernels, modelled seconds) of each registered operation of ours at a shape, by its name."""
    times = json.loads(baseline.read_text())["microseconds"] if baseline.exists() and shape.batch == 64 else {}
    table = {}
    for operator in OPERATORS.values():
        for config in operator.configs[:1]:
            launches = operator.aot(shape, config)
            for direction, name in (("forward", operator.name), ("backward", f"{operator.name}_backward")):
                mine = [x for x in launches if x.direction == direction]
                seconds = sum(times.get(f"{shape.name}/{operator.name}/{x.name}", 0.0) for x in mine) * 1e-6
                table[name] = (len(mine), seconds)
    return table


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
    config = pixeldit.Config(
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
    result, kernels = Trace(body, shape.batch), kernel_table(shape, baseline)
    parameters = {p.untyped_storage()._cdata for p in model.parameters()}
    forced = {"PIXELGEN_OPS": "triton" if body in ("triton", "recompute") else "reference"}
    with patch.dict(os.environ, forced), GpuKernels(fused_norms=body == "fused_norms"):
        with saved_bytes(parameters) as kept, Recorder(result.forward, kernels):
            loss = model.velocity_loss(images, y, noising, weight).mean()
        for x, size in kept.values():
            kind = f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}"
            number, total = result.saved_as.get(kind, (0, 0))
            result.saved_as[kind] = (number + 1, total + size)
        result.saved = sum(size for _, size in kept.values())
        with Recorder(result.backward, kernels):
            loss.backward()
    return result


def summary(traces: list[Trace]) -> str:
    """One row a body, as a Markdown table."""
    lines = [
        "| body | forward MB/image | backward MB/image | total GB/image | saved MB/image | GFLOP/image "
        "| kernels/step | modelled us/image | images/s |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for t in traces:
        one = 1.0 / t.batch
        seconds = t.total("seconds") * one
        lines.append(
            f"| {t.body} | {t.total('bytes', ('forward',)) * one / 1e6:.0f} "
            f"| {t.total('bytes', ('backward',)) * one / 1e6:.0f} | {t.total('bytes') * one / 1e9:.2f} "
            f"| {t.saved * one / 1e6:.0f} | {t.total('flops') * one / 1e9:.2f} | {t.total('kernels')} "
            f"| {seconds * 1e6:.0f} | {1.0 / seconds:.0f} |"
        )
    return "\n".join(lines)


def details(t: Trace, top: int) -> str:
    """The operations that move most and the tensors that stay, as Markdown tables."""
    rows = [(phase, op, c) for phase in ("forward", "backward") for op, c in getattr(t, phase).items()]
    rows.sort(key=lambda row: -row[2].bytes)
    lines = [f"\n{t.body}", "", "| pass | operation | calls | kernels | MB/image | GFLOP/image | us/image |",
             "|---|---|--:|--:|--:|--:|--:|"]  # fmt: skip
    for phase, op, c in rows[:top]:
        per = t.batch
        lines.append(
            f"| {phase} | {op} | {c.calls} | {c.kernels} | {c.bytes / per / 1e6:.1f} | {c.flops / per / 1e9:.2f} "
            f"| {c.seconds / per * 1e6:.1f} |"
        )
    lines += ["", "| saved for backward | tensors | MB/image |", "|---|--:|--:|"]
    for kind, (number, size) in sorted(t.saved_as.items(), key=lambda item: -item[1][1])[:top]:
        lines.append(f"| {kind} | {number} | {size / t.batch / 1e6:.1f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", choices=sorted(MODELS), default="XL")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--bodies", default=",".join(BODIES), help="bodies, by comma")
    parser.add_argument("--top", type=int, default=12, help="operations to list for each body")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    shape = ModelShape(**{**asdict(MODELS[args.model]), "batch": args.batch})
    traces = [trace(shape, body) for body in args.bodies.split(",")]
    print(f"PixelDiT-{args.model}, {shape.image} px, {shape.batch} images, bf16; modelled for {H100.name}\n")
    print(summary(traces))
    for t in traces:
        print(details(t, args.top))
    if args.json:
        args.json.write_text(json.dumps([asdict(t) for t in traces], indent=1) + "\n")


if __name__ == "__main__":
    main()
