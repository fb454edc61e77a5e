"""Processes that share the work of a command which trains nothing: who draws what, and how it comes together.

Images go by batches, whole: rank r of W takes every W-th batch from the r-th on. So each is drawn in the company in
which one process would draw it, and comes out bit for bit the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from pixelgen_fast.engine import group
from pixelgen_fast.engine.heartbeat import Heartbeat


class Team:
    """This process among those of its launcher; alone where there is none. heart: of this rank, beating."""

    def __init__(self, heart: Heartbeat) -> None:
        self.rank, self.world = heart.rank, heart.world
        self.heart = heart
        if self.world > 1:
            # what they tell each other is on the host, wherever they draw
            group.join(torch.device("cpu"), heart.store)

    def first(self, function: Callable[[], Any]) -> Any:
        """What rank 0 finds, on every rank; its error likewise. All ranks call it."""
        outcome: list[Any] = [None, None]
        if self.rank == 0:
            try:
                outcome[0] = function()
            except Exception as error:
                outcome[1] = error
        if self.world > 1:
            dist.broadcast_object_list(outcome, src=0)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks on rank 0, nothing on the others. All ranks call it."""
        if self.world == 1:
            return [value]
        values = [None] * self.world if self.rank == 0 else None
        dist.gather_object(value, values)
        return values or []

    def drawing(self) -> dict[str, Any]:
        """Options of `Generator.batches` for this rank's share; rank 0 shows its progress."""
        options = {"share": (self.rank, self.world), "progress": self.rank == 0}
        return options | {"before_pass": self.heart.moved}
