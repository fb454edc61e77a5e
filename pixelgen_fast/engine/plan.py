"""What a run will need, before it starts: parameters, FLOPs and memory by ZeRO stage. Nothing is allocated.

    stage 1   weights + gradients + (master, moments, averages) / W
    stage 2   weights + (gradients + master, moments, averages) / W
    stage 3   (weights + gradients + master, moments, averages) / W

for W ranks; activations are what lives from forward to backward for one micro-batch, counted on the meta device.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from pixelgen_kernels.bodies import gpu_bodies
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from pixelgen_fast.config import Config
from pixelgen_fast.engine.alignment import build_alignment
from pixelgen_fast.engine.metrics import forward_flops
from pixelgen_fast.models.system import BaseSystem


@dataclass(frozen=True)
class Plan:
    """parameters; forward FLOPs of an image; activation bytes of an image; bytes of a weight; averages kept.

    by_muon: how many of the parameters Muon trains, with one moment instead of two.
    alignment_flops: of an image, of the teacher and of the projector, both forward; None where nothing is aligned.
    """

    parameters: int
    flops: int
    activation_bytes: int
    weight_bytes: int
    averages: int
    alignment_flops: tuple[int, int] | None = None
    by_muon: int = 0

    def state_bytes(self, stage: int, world: int) -> float:
        """Bytes of weights, gradients and optimizer state on each of `world` ranks at a ZeRO stage."""
        weights, gradients = self.weight_bytes * self.parameters, 4 * self.parameters
        # DeepSpeed keeps an fp32 master copy beside the weights, in an fp32 run too.
        optimizer = 4 * (3 + self.averages) * self.parameters - 4 * self.by_muon
        shared = (optimizer, gradients, weights)[:stage]
        whole = (optimizer, gradients, weights)[stage:]
        return sum(shared) / world + sum(whole)


def plan(model: BaseSystem, config: Config, precision: str) -> Plan:
    """Count a model that lives on the meta device; a bf16 run is on a GPU and runs the operators of a GPU.

    Raises ValueError for an alignment that does not fit the model.
    """
    aligned = alignment_flops(model, config)
    if precision == "bf16":
        with gpu_bodies():
            activation_bytes = saved_bytes(model.bfloat16())
    else:
        activation_bytes = saved_bytes(model)
    return Plan(
        parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        flops=forward_flops(model),
        activation_bytes=activation_bytes,
        weight_bytes=2 if precision == "bf16" else 4,
        averages=len(config.optimizer.ema),
        alignment_flops=aligned,
        by_muon=sum(p.numel() for p in model.matrices()) if config.optimizer.name == "muon" else 0,
    )


def alignment_flops(model: BaseSystem, config: Config) -> tuple[int, int] | None:
    """Forward FLOPs of an image, of the teacher and of the projector, on the meta device; None without alignment."""
    size, meta = config.data.image_size, torch.device("meta")
    config = replace(config, alignment=replace(config.alignment, cache=None, compile=False))
    with meta:
        alignment = build_alignment(config, model, None, meta)
        if alignment is None:
            return None
        with FlopCounterMode(display=False) as teacher:
            alignment.targets(torch.empty(1, size, size, 3, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64))
        with FlopCounterMode(display=False) as projector:
            alignment.projector(torch.empty(1, model.grid**2, alignment.width))
    return teacher.get_total_flops(), projector.get_total_flops()


class Allocations(TorchDispatchMode):
    """Remembers every storage that an operation makes, without keeping it. known: tensors that were there before.

    So were those that an operation reads and none has made: weights of a network that is no part of the model.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage()._cdata for tensor in known}
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        read = {storage._cdata for storage in storages((args, kwargs))}
        self.known |= read - self.storages.keys()
        out = func(*args, **(kwargs or {}))
        for storage in storages(out):
            if storage._cdata not in self.known:  # else a view
                self.storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return out

    def alive(self) -> int:
        """Bytes of the storages that something still holds."""
        return sum(size for storage, size in self.storages.values() if not storage.expired())


def storages(tree: Any) -> list[torch.UntypedStorage]:
    """The storage of every tensor in a tree."""
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def saved_bytes(model: BaseSystem, batch: int = 2) -> int:
    """Bytes per image that live from forward to backward: those of a forward pass on meta whose output is dropped.

    Parameters and buffers are not counted; what a recomputed block keeps is.
    """
    with Allocations([*model.parameters(), *model.buffers()]) as allocations:
        graph = model.trial(batch).grad_fn
    assert graph is not None
    return allocations.alive() // batch


def describe(p: Plan, config: Config, precision: str, worlds: tuple[int, ...] = (1, 4, 8, 64)) -> str:
    """The plan as lines for `--dry-run`."""
    t, activations = config.train, p.activation_bytes * config.train.micro_batch
    alignment = []
    if p.alignment_flops is not None:
        teacher, projector = (flops / 1e9 for flops in p.alignment_flops)
        alignment = [f"{'':<19}{teacher:.2f} teacher forward, {3 * projector:.2f} projector forward and backward"]
    lines = [
        f"parameters         {p.parameters:,}" + (f", of which Muon trains {p.by_muon:,}" if p.by_muon else ""),
        f"GFLOPs per image   {p.flops / 1e9:.2f} forward, {3 * p.flops / 1e9:.2f} forward and backward"
        " (2 per multiply-add)",
        *alignment,
        f"images             {t.images:,} in {-(-t.images // t.global_batch):,} steps of {t.global_batch}",
        f"activations        {p.activation_bytes / 1e6:.1f} MB per image, {activations / 1e9:.2f} GB per micro-batch "
        f"of {t.micro_batch}, kept for backward with train.recompute={t.recompute}",
        f"memory per GPU in {precision}, computed: weights, gradients, optimizer, averages and activations",
        "  ranks " + "".join(f"{f'stage {stage}':>12}" for stage in config.optimizer.stages),
    ]
    for world in worlds:
        cells = "".join(
            f"{(p.state_bytes(stage, world) + activations) / 1e9:>9.2f} GB" for stage in config.optimizer.stages
        )
        lines.append(f"  {world:>5} {cells}")
    return "\n".join(lines)
