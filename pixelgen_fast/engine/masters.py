"""Float32 master weights of a bf16 module on one rank, which has nothing to shard.

    weights of a group  [ w0 | w1 | ... ]  bf16, one buffer; the module's parameters are views of it
    masters             [ w0 | w1 | ... ]  fp32, what the optimizer trains; it writes the bf16 ones as it goes
    gradients           [ g0 | g1 | ... ]  fp32, filled from the module's bf16 ones before a step

Each step reads the gradients once and copies nothing back, and an optimizer step is one launch a group. Every weight
begins at a multiple of 32 bytes in bf16, so that products and kernels keep their widest accesses.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Literal

import torch
from pixelgen_kernels.adamw_ema import WIDE
from torch import Tensor, nn

from pixelgen_fast.engine.optimizer import AdamWEMA, Place


def keeper_of_state(dtype: str, stage: int, world: int, accumulation: int) -> Literal["shards", "masters", "module"]:
    """Where a run's float32 weights and moments lie: in DeepSpeed's shards, in Masters, or at the module's parameters.

    One rank at stage 1 has nothing to shard. In bf16 it has Masters, with one micro-batch a step: several add up in
    fp32 as they come, which DeepSpeed does.
    """
    alone = stage == 1 and world == 1
    if alone and dtype == "bf16" and accumulation == 1:
        return "masters"
    return "module" if alone and dtype == "fp32" else "shards"


class Masters:
    """Replaces the parameters in an optimizer's groups by one flat float32 parameter a group.

    optimizer: over bf16 parameters, which become views.
    """

    @torch.no_grad()
    def __init__(self, optimizer: AdamWEMA) -> None:
        self.places: dict[nn.Parameter, tuple[nn.Parameter, int]] = {}
        self.trained: list[nn.Parameter] = []
        self.gradients: list[Tensor] = []
        self.flat: list[tuple[nn.Parameter, Tensor]] = []
        for group in optimizer.param_groups:
            parameters = group["params"]
            spans = [-(-p.numel() // WIDE) * WIDE for p in parameters]
            starts = [end - span for end, span in zip(accumulate(spans), spans, strict=True)]
            weights = torch.zeros(sum(spans), dtype=torch.bfloat16, device=parameters[0].device)
            master = nn.Parameter(torch.zeros_like(weights, dtype=torch.float32))
            gradient = torch.zeros_like(master)
            for p, start in zip(parameters, starts, strict=True):
                master[start : start + p.numel()] = p.flatten()
                part = weights[start : start + p.numel()].view_as(p)
                part.copy_(p)
                p.data = part
                self.places[p] = master, start
                self.trained.append(p)
                self.gradients.append(gradient[start : start + p.numel()].view_as(p))
            self.flat.append((master, gradient))
            group["params"] = [master]
            optimizer.copies[master] = weights
        optimizer.locate({p: Place(master, start, 0, p.numel()) for p, (master, start) in self.places.items()})

    def of(self, parameter: nn.Parameter) -> tuple[nn.Parameter, int]:
        """(flat master, first element there) of a parameter of the module."""
        return self.places[parameter]

    @torch.no_grad()
    def take_gradients(self) -> None:
        """Copy the module's gradients; a parameter without one counts as having zeros, and is decayed as the others."""
        missing = [g for p, g in zip(self.trained, self.gradients, strict=True) if p.grad is None]
        if missing:
            torch._foreach_zero_(missing)
        pairs = [(g, p.grad) for p, g in zip(self.trained, self.gradients, strict=True) if p.grad is not None]
        torch._foreach_copy_([g for g, _ in pairs], [grad for _, grad in pairs])
        for master, gradient in self.flat:
            master.grad = gradient
