"""What a training step starts on a GPU, listed without one: the step runs on the meta device and is recorded.

    step_launches(config) = module_launches(module of the run) + optimizer_launches(its optimizer)

The list is exact where tensors lie as in a run. One bf16 rank keeps its weights as `masters` has them. ZeRO 1 and 2 cut
a run's weights from one buffer, one after another in the optimizer's order, so that behind a weight of an odd size no
other begins at a multiple of 16 bytes. The shard that ZeRO hands to the optimizer has a size that depends on the number
of ranks: it is listed for all.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from pixelgen_kernels.bodies import forced
from pixelgen_kernels.launch import Started, recording
from torch import Tensor, nn

from pixelgen_fast import config as cfg
from pixelgen_fast import models
from pixelgen_fast.engine import masters
from pixelgen_fast.engine.alignment import build_alignment
from pixelgen_fast.engine.objective import TrainingObjective, build_objective
from pixelgen_fast.engine.optimizer import AdamWEMA
from pixelgen_fast.engine.parallel import wrap_blocks
from pixelgen_fast.engine.run_optimizer import run_optimizer

META = torch.device("meta")
INT32 = 2**31


def step_launches(
    config: cfg.Config, precision: str = "bf16", ranks: int = 1, multiprocessors: int = 132
) -> list[Started]:
    """Every launch of a micro-batch and of an optimizer step of a run, in the order of starting.

    precision: "bf16" or "fp32". multiprocessors: of the GPU that is planned for. Neither images nor weights are read:
    of a teacher or DINO the architecture is enough. Raises ValueError for a configuration that a run would refuse.
    """
    stage, size, batch = config.train.zero_stage, config.data.image_size, config.train.micro_batch
    keeper = masters.keeper_of_state(precision, stage, ranks, config.train.global_batch // (batch * ranks))
    sharded = keeper == "shards"
    module, optimizer = build_on_meta(config, precision, in_one_buffer=sharded and stage < 3)
    kept = masters.Masters(optimizer) if keeper == "masters" else None
    with META:
        images = torch.empty(batch, size, size, 3, dtype=torch.uint8)
        labels, numbers = (torch.zeros(batch, dtype=torch.int64) for _ in range(2))
    of_module = module_launches(module, images, labels, numbers, multiprocessors)
    if kept:
        kept.take_gradients()
    return [*of_module, *optimizer_launches(optimizer, sharded, multiprocessors)]


def build_on_meta(config: cfg.Config, precision: str, in_one_buffer: bool) -> tuple[TrainingObjective, AdamWEMA]:
    """The module and the optimizer of a run on the meta device. in_one_buffer: its weights lie so, as ZeRO 1, 2 do."""
    config = replace(config, alignment=replace(config.alignment, cache=None, compile=False))
    classes = config.data.num_classes or 1  # launches do not depend on it
    with META:
        model = models.build_model(config, classes)
        wrap_blocks(model.blocks(), recompute=config.train.recompute, compile_blocks=False)
        alignment = build_alignment(config, model, None, META)
        module = build_objective(model, config, alignment)
        if precision == "bf16":
            module = module.bfloat16()
        optimizer = run_optimizer(config.optimizer, model, alignment)
    if in_one_buffer:
        for group in optimizer.param_groups:
            _share_buffer(group["params"])
    return module, optimizer


def module_launches(
    module: TrainingObjective, images: Tensor, labels: Tensor, numbers: Tensor, multiprocessors: int = 132
) -> list[Started]:
    """What forward and backward of a training objective start on a micro-batch; the parameters get gradients.

    The module and all tensors are on the meta device.
    """
    with forced("triton"), recording(multiprocessors) as started:
        module(images, labels, numbers).backward()
    return started


def optimizer_launches(optimizer: AdamWEMA, sharded: bool, multiprocessors: int = 132) -> list[Started]:
    """What a step of an optimizer over parameters on the meta device starts.

    sharded: ZeRO hands it one flat float32 shard of each group, whose size depends on the number of ranks; otherwise it
    updates the parameters themselves, which must have gradients.
    """
    if not sharded:
        with forced("triton"), recording(multiprocessors) as started:
            optimizer.step()
        return started
    with META:
        # Muon's group starts products of PyTorch and no kernel of ours
        groups = [group for group in optimizer.param_groups if "stacked" not in group]
        groups = [group | {"params": _shards(group["params"])} for group in groups]
        flat = AdamWEMA(groups, ema_decays=optimizer.ema_decays, ema_warmup=optimizer.ema_warmup, clip_norm=1.0)
    return optimizer_launches(flat, False, multiprocessors)


def _shards(params: list[nn.Parameter]) -> list[nn.Parameter]:
    """A group's shards by all that a launch sees of their size: 32 bits or more, and what is left of a multiple of 16
    (nothing, one element, several)."""
    whole = [16, *([INT32] if sum(p.numel() for p in params) >= INT32 else [])]
    sizes = [size + rest for size in whole for rest in range(3)]
    shards = [nn.Parameter(torch.empty(size, dtype=torch.float32)) for size in sizes]
    for shard in shards:
        shard.grad = torch.empty_like(shard)
    return shards


def _share_buffer(params: list[nn.Parameter]) -> None:
    """Cut parameters from one buffer, in their order, as ZeRO 1 and 2 do."""
    buffer, start = torch.empty(sum(p.numel() for p in params), dtype=params[0].dtype, device=META), 0
    for p in params:
        p.data = buffer[start : start + p.numel()].view(p.shape)
        start += p.numel()
