"""Processes that answer together about files: rank 0 looks, and all hear the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from pixelgen_fast.runs.shards import CheckpointError


@dataclass(frozen=True)
class Ranks:
    """This process among the ranks of a run. host_group: a process group for host objects; None for the default one."""

    rank: int
    world: int
    host_group: dist.ProcessGroup | None = None

    def on_rank_zero(self, function: Callable[[], Any]) -> Any:
        """function() as rank 0 finds it, on every rank; its failure likewise. Raises CheckpointError."""
        outcome: Any = None
        if self.rank == 0:
            try:
                outcome = function()
            except CheckpointError as error:
                outcome = error
            except OSError as error:
                outcome = CheckpointError(f"checkpoint failed: {error}")
        if self.world > 1:
            box = [outcome]
            dist.broadcast_object_list(box, src=0, group=self.host_group)
            outcome = box[0]
        if isinstance(outcome, CheckpointError):
            raise outcome
        return outcome

    def all_gather(self, value: Any) -> list[Any]:
        """The value of each rank, on every rank."""
        if self.world == 1:
            return [value]
        everyone: list[Any] = [None] * self.world
        dist.all_gather_object(everyone, value, group=self.host_group)
        return everyone


def everyone(group: dist.ProcessGroup | None = None) -> Ranks:
    """All processes of the run, or this one alone."""
    together = dist.is_available() and dist.is_initialized()
    return Ranks(dist.get_rank(), dist.get_world_size(), group) if together else Ranks(0, 1)
