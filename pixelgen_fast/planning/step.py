"""The training step of a configuration, traced: the objective that a run trains, and the optimizer on a rank's share.

    forward, backward    of one micro-batch, through the very module that ZeRO wraps, teacher and energy path included
    optimizer            AdamW and averages over ceil(N / W) of the N weights of a group, the float32 shard of a rank;
                         one rank alone updates its float32 masters, as engine/masters.py does

Recomputation is traced as it runs: what backward computes again is a phase of its own. Needs neither weights nor data.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache

import torch
from pixelgen_kernels.bodies import gpu_bodies
from pixelgen_kernels.report.command import BASELINE
from pixelgen_kernels.shapes import MODELS
from torch import Tensor, nn

from pixelgen_fast.config import Config
from pixelgen_fast.engine import masters
from pixelgen_fast.engine.launches import META, build_on_meta
from pixelgen_fast.engine.objective import TrainingObjective
from pixelgen_fast.engine.optimizer import AdamWEMA
from pixelgen_fast.errors import InputError
from pixelgen_fast.planning.gpu_kernels import gpu_kernels
from pixelgen_fast.planning.lifetimes import Lifetimes
from pixelgen_fast.planning.parts import FROZEN, Parts
from pixelgen_fast.planning.trace import Modelled, Phase, Recorder, Trace, modelled

OPTIMIZER = "optimizer"


@dataclass(frozen=True)
class Step:
    """What one rank does in a step.

    trace: of one micro-batch, forward and backward. optimizer: of a step. kept: bytes of an image that live from
    forward to backward, by part. peak: the most bytes that live at once in a micro-batch, weights and their gradients
    left out. parameters: elements of each that is trained. frozen_bytes: weights that are not.
    """

    config: Config
    trace: Trace
    optimizer: Trace
    kept: dict[str, float]
    peak: int
    parameters: tuple[int, ...]
    frozen_bytes: int

    @property
    def model_flops(self) -> int:
        """FLOPs of an image, forward and backward, as shares of a GPU's rate count them: three times forward's, with
        nothing that is computed again and no frozen network."""
        forward = (op for op in self.trace.operations if op.phase == "forward" and op.part != FROZEN)
        return 3 * sum(op.flops for op in forward) // self.trace.batch


@cache
def report() -> Modelled:
    """The committed report's times of every model; of an installation without it, none."""
    return modelled(MODELS.values(), BASELINE) if BASELINE.exists() else Modelled()


def trace_step(config: Config, world: int, memory: bool = True) -> Step:
    """Trace a bf16 run's step on `world` ranks on the meta device. memory: False follows no tensor's life, for who asks
    for times alone; kept and peak are then nothing.

    Raises InputError for a system whose step cannot be traced by shapes alone, and what building the parts raises.
    """
    module, optimizer = build_on_meta(config, "bf16", in_one_buffer=False)
    module.model.read_shapes()
    trained = [p for p in module.parameters() if p.requires_grad]
    trace, parts = Trace(config.train.micro_batch), Parts(module)
    lives = Lifetimes([*module.parameters(), *module.buffers()], lambda: parts.now()[0])
    followed = lives if memory else nullcontext()
    with gpu_bodies(), gpu_kernels(fused_norms=True), parts.watching(), Recorder(trace, report(), parts.now), followed:
        try:
            loss = _forward(module, config)
            kept = {part: size / trace.batch for part, size in lives.kept().items()}
            loss.backward()
        except (NotImplementedError, RuntimeError) as error:
            raise InputError(
                f"model.system {config.model.system} has a step that depends on values, so that its shapes do not "
                f"tell what it does, and it has no plan: {error}"
            ) from error
    peak = lives.peak([p.grad for p in trained if p.grad is not None])
    updated = trace_optimizer(config, optimizer, world)
    return Step(config, trace, updated, kept, peak, tuple(p.numel() for p in trained), parts.frozen_bytes)


def _forward(module: TrainingObjective, config: Config) -> Tensor:
    batch, size = config.train.micro_batch, config.data.image_size
    with META:
        images = torch.empty(batch, size, size, 3, dtype=torch.uint8)
        labels, numbers = (torch.zeros(batch, dtype=torch.int64) for _ in range(2))
    return module(images, labels, numbers)


def trace_optimizer(config: Config, optimizer: AdamWEMA, world: int) -> Trace:
    """Trace an optimizer's step on the share that one of `world` ranks has. Its parameters are on the meta device and
    have gradients."""
    trace, t = Trace(config.train.global_batch // world), config.train
    accumulation = t.global_batch // (t.micro_batch * world)
    keeper = masters.keeper_of_state("bf16", t.zero_stage, world, accumulation)
    phase: tuple[str, Phase] = (OPTIMIZER, "optimizer")
    with gpu_bodies():
        if keeper == "masters":
            kept = masters.Masters(optimizer)
            with Recorder(trace, report(), lambda: phase):
                kept.take_gradients()
        else:
            optimizer = _sharded(optimizer, world)
        for group in optimizer.param_groups:
            for param in group["params"]:
                optimizer.init_state(param, group)
        with Recorder(trace, report(), lambda: phase):
            optimizer.step()
    return trace


def _sharded(optimizer: AdamWEMA, world: int) -> AdamWEMA:
    """The same optimizer over one flat float32 shard of each group."""
    groups = []
    for group in optimizer.param_groups:
        numel = -(-sum(p.numel() for p in group["params"]) // world)
        shard = nn.Parameter(torch.empty(numel, device=META))
        shard.grad = torch.empty_like(shard)
        groups.append(group | {"params": [shard]})
    return AdamWEMA(groups, ema_decays=optimizer.ema_decays, ema_warmup=optimizer.ema_warmup, clip_norm=1.0)
