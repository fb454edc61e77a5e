"""What the ranks of a run agree on, on the host."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist


def any_rank(wishes: Sequence[bool], group: dist.ProcessGroup | None = None) -> list[bool]:
    """For each wish, whether any rank has it; all ranks must call it, with as many.

    One rank alone answers at once; more of them reduce over `group`, best a gloo group on a GPU machine
    (`ZeroEngine.host_group`), since NCCL would make the host wait for the device.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) == 1:
        return list(wishes)
    device = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
    flags = torch.tensor(wishes, dtype=torch.int32, device=device)
    dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=group)
    return [bool(flag) for flag in flags.tolist()]
