"""What a run will need, before it starts: parameters, FLOPs and memory by ZeRO stage. Nothing is allocated.

    stage 1   weights + gradients + (master, moments, averages) / W
    stage 2   weights + (gradients + master, moments, averages) / W
    stage 3   (weights + gradients + master, moments, averages) / W

for W ranks; activations are what autograd saves for one micro-batch, counted on the meta device.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pixelgen_fast.config import Config
from pixelgen_fast.engine.metrics import forward_flops


@dataclass(frozen=True)
class Plan:
    """parameters; forward FLOPs of an image; activation bytes of an image; bytes of a weight; averages kept."""

    parameters: int
    flops: int
    activation_bytes: int
    weight_bytes: int
    averages: int

    def state_bytes(self, stage: int, world: int) -> float:
        """Bytes of weights, gradients and optimizer state on each of `world` ranks at a ZeRO stage."""
        weights, gradients = self.weight_bytes * self.parameters, 4 * self.parameters
        # DeepSpeed keeps an fp32 master copy beside the weights, in an fp32 run too.
        optimizer = 4 * (3 + self.averages) * self.parameters
        shared = (optimizer, gradients, weights)[:stage]
        whole = (optimizer, gradients, weights)[stage:]
        return sum(shared) / world + sum(whole)


def plan(model: nn.Module, config: Config, precision: str) -> Plan:
    """Count a model that lives on the meta device; a bf16 run is on a GPU and runs the operators of a GPU."""
    if precision == "bf16":
        with gpu_operators():
            activation_bytes = saved_bytes(model.bfloat16(), config.data.image_size)
    else:
        activation_bytes = saved_bytes(model, config.data.image_size)
    return Plan(
        parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        flops=forward_flops(model, config.data.image_size),
        activation_bytes=activation_bytes,
        weight_bytes=2 if precision == "bf16" else 4,
        averages=len(config.optimizer.ema),
    )


@contextmanager
def gpu_operators() -> Iterator[None]:
    """Meta tensors take the operator bodies of a GPU inside, unless PIXELGEN_OPS says otherwise already."""
    if "PIXELGEN_OPS" in os.environ:
        yield
        return
    os.environ["PIXELGEN_OPS"] = "triton"
    try:
        yield
    finally:
        del os.environ["PIXELGEN_OPS"]


def saved_bytes(model: nn.Module, image_size: int, batch: int = 2) -> int:
    """Bytes per image that autograd keeps from forward to backward, parameters not counted.

    Counted with saved-tensor hooks over `batch` images on the meta device; a storage is counted once.
    """
    own = {p.untyped_storage()._cdata for p in [*model.parameters(), *model.buffers()]}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    parameter = next(model.parameters())
    z = torch.empty(batch, 3, image_size, image_size, device="meta", dtype=parameter.dtype)
    t, y = torch.empty(batch, device="meta"), torch.zeros(batch, dtype=torch.int64, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(z, t, y)
    return sum(storage.nbytes() for storage in kept.values()) // batch


def describe(p: Plan, config: Config, precision: str, worlds: tuple[int, ...] = (1, 4, 8, 64)) -> str:
    """The plan as lines for `--dry-run`."""
    t, activations = config.train, p.activation_bytes * config.train.micro_batch
    kept = "recomputed by train.checkpoint_blocks" if t.checkpoint_blocks else "saved for backward"
    lines = [
        f"parameters         {p.parameters:,}",
        f"GFLOPs per image   {p.flops / 1e9:.2f} forward, {3 * p.flops / 1e9:.2f} forward and backward"
        " (2 per multiply-add)",
        f"images             {t.images:,} in {-(-t.images // t.global_batch):,} steps of {t.global_batch}",
        f"activations        {p.activation_bytes / 1e6:.1f} MB per image, {activations / 1e9:.2f} GB per micro-batch "
        f"of {t.micro_batch}, {kept}",
        f"memory per GPU in {precision}, computed: weights, gradients, optimizer and averages"
        + ("" if t.checkpoint_blocks else ", plus activations"),
        "  ranks " + "".join(f"{f'stage {stage}':>12}" for stage in (1, 2, 3)),
    ]
    extra = 0 if t.checkpoint_blocks else activations
    for world in worlds:
        cells = "".join(f"{(p.state_bytes(stage, world) + extra) / 1e9:>9.2f} GB" for stage in (1, 2, 3))
        lines.append(f"  {world:>5} {cells}")
    return "\n".join(lines)
