"""Reading one number a step from the device without making the host wait for it.

On a GPU the number is copied to pinned memory behind the step and read when it has arrived, a step or two later; on a
CPU it is read at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class Skipped(NamedTuple):
    """A step that was skipped: its images [first, last) and how many steps in a row it makes."""

    first: int
    last: int
    in_a_row: int


class SkipWatch:
    """Hears of skipped steps from the optimizer's device counter."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self._pending: deque[tuple[Tensor, torch.cuda.Event | None, int, int]] = deque()

    def push(self, skipped_in_a_row: Tensor, first: int, last: int) -> None:
        """Ask for the counter as it stands after the step on images [first, last)."""
        event = None
        if self.cuda:
            value = torch.empty_like(skipped_in_a_row, device="cpu", pin_memory=True)
            value.copy_(skipped_in_a_row, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        else:
            value = skipped_in_a_row.clone()
        self._pending.append((value, event, first, last))

    def poll(self) -> Iterator[Skipped]:
        """Yield the skipped steps that have become known, oldest first."""
        while self._pending and (self._pending[0][1] is None or self._pending[0][1].query()):
            value, _, first, last = self._pending.popleft()
            if in_a_row := int(value):
                yield Skipped(first, last, in_a_row)
