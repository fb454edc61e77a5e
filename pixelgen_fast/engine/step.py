"""One training step: forward, loss, backward of every micro-batch, then clipping, AdamW and averages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from pixelgen_fast.data import Batch
from pixelgen_fast.engine.objective import TrainingObjective


class Engine(Protocol):
    """What trains a module: `pixelgen_fast.engine.zero.ZeroEngine`, or anything that offers the same."""

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor: ...
    def backward(self, loss: Tensor) -> None: ...
    def step(self) -> Any: ...


def training_step(
    engine: Engine,
    objective: TrainingObjective,
    batches: Sequence[Batch],
    first_numbers: Sequence[int],
    at: Callable[[str], object] = lambda part: None,
) -> Tensor:
    """One optimizer step on the micro-batches of this rank. Nothing here waits for the device.

    objective: the module that the engine trains. first_numbers: the number of each micro-batch's first image.
    at: told which part of the step begins.
    Returns float32 [2 + parts], on the device: how many micro-batches had a finite loss, the sum of their losses, and
    of each part of it where there are several.
    """
    sums = torch.zeros(2 + len(objective.columns), device=batches[0].images.device)
    for batch, number in zip(batches, first_numbers, strict=True):
        objective.begin(number)
        at("forward")
        loss = engine(batch.images, batch.labels, batch.numbers)
        finite = torch.isfinite(loss.detach())
        at("backward")
        # A loss that is not finite must not pass as a step, even if its gradient happens to be.
        engine.backward(loss * torch.where(finite, 1.0, torch.nan))
        at("optimizer")
        engine.step()
        losses = [torch.ones_like(loss), loss.detach(), *(objective.parts[name] for name in objective.columns)]
        sums += torch.where(finite, torch.stack(losses), 0.0)
    return sums
