"""Whether a run is sound, from two numbers a step: steps skipped in a row, and the loss.

    bad     the loss or gradient is not finite, or the loss is above train.loss_range times its running mean
    calm    the loss is below CALM times its running mean: the weights that it was taken with are good

The loss of the step on images [first, last) is that of the weights at image `first`, so it proves the checkpoint of
that image, and every earlier one. The mean is over about the last MEMORY steps that were not bad.

The numbers are read without making the host wait for the device: on a GPU they are copied to pinned memory behind the
step and read when they have arrived, a step or two later; on a CPU they are read at once.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

CALM, MEMORY = 2.0, 100


class Step(NamedTuple):
    """What became known of the step on images [first, last): how many in a row were skipped, and its mean loss.

    loss: of this rank's micro-batches, nan where none had a finite one.
    """

    first: int
    last: int
    skipped_in_a_row: int
    loss: float


class StepWatch:
    """Hears of steps from the device."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self._pending: deque[tuple[Tensor, torch.cuda.Event | None, int, int]] = deque()

    def push(self, skipped_in_a_row: Tensor, losses: Tensor, first: int, last: int) -> None:
        """Ask for the counter and the losses, as `training_step` gives them, of the step on images [first, last)."""
        numbers = torch.cat((skipped_in_a_row.view(1).to(losses.dtype), losses[:2]))
        event = None
        if self.cuda:
            value = torch.empty_like(numbers, device="cpu", pin_memory=True)
            value.copy_(numbers, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            numbers = value
        self._pending.append((numbers, event, first, last))

    def poll(self, wait: bool = False) -> Iterator[Step]:
        """Yield the steps that have become known, oldest first. wait: for the last one too."""
        while self._pending:
            numbers, event, first, last = self._pending[0]
            if event is not None and wait:
                event.synchronize()
            if event is not None and not event.query():
                return
            self._pending.popleft()
            skipped, count, total = numbers.tolist()
            yield Step(first, last, int(skipped), total / count if count else math.nan)


class Health:
    """What the steps of a run say of its weights, so far as they are known.

    loss_range: None where the loss has no range. good: image of the newest checkpoint that is proven, None for none.
    """

    def __init__(self, loss_range: float | None) -> None:
        self.loss_range = loss_range
        self.mean, self.count = 0.0, 0
        self.bad_in_a_row = 0
        self.good: int | None = None
        self._unproven: int | None = None
        self._calm = -1  # first image of the newest calm step

    def add(self, step: Step) -> str:
        """Take in a step; returns what to say of it, nothing of most."""
        limit = math.inf if self.loss_range is None or not self.count else self.loss_range * self.mean
        finite = math.isfinite(step.loss) and not step.skipped_in_a_row
        images = f"step on images {step.first:,} to {step.last:,}"
        if finite and step.loss <= limit:
            self.bad_in_a_row = 0
            if step.loss <= CALM * self.mean or not self.count:
                self._calm = step.first
                self._prove()
            self.count = min(self.count + 1, MEMORY)
            self.mean += (step.loss - self.mean) / self.count
            return ""
        self.bad_in_a_row += 1
        row = f"({self.bad_in_a_row} in a row)"
        if not finite:
            return f"{images} skipped: loss or gradient is not finite {row}"
        return f"{images}: loss {step.loss:.4g} is far above {self.mean:.4g}, its mean; no checkpoint is written {row}"

    def saved(self, nimg: int) -> None:
        """There is a new checkpoint, which a calm step is to prove, or has proven while it was written."""
        self._unproven = nimg
        self._prove()

    @property
    def kept(self) -> set[int]:
        """Images of the checkpoints that must not be deleted: the good one, and the one that may become it."""
        return {nimg for nimg in (self.good, self._unproven) if nimg is not None}

    def _prove(self) -> None:
        if self._unproven is not None and self._unproven <= self._calm:
            self.good, self._unproven = self._unproven, None

    def state(self) -> dict[str, Any]:
        """Plain types, for a checkpoint."""
        return {"loss": self.mean, "steps": self.count, "good": self.good}

    def resume(self, state: Any, nimg: int, proven: bool = False) -> None:
        """Go on from the checkpoint of image `nimg`. state: what it keeps of this; another makes a new beginning.
        proven: it is known to be good, which it could not say of itself."""
        self.bad_in_a_row, self._unproven, self._calm = 0, nimg, -1
        self.mean, self.count, self.good = 0.0, 0, None
        match state:
            case {"loss": float(loss), "steps": int(steps), "good": int() | None as good}:
                self.mean, self.count, self.good = loss, steps, good
        if proven:
            self.good, self._unproven = nimg, None
