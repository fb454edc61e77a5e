"""The process group of a run: where its ranks meet, and how they join."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist


def meet(seconds: float) -> dist.Store | None:
    """The store at which the ranks of a launcher meet; None in a process that has no launcher.

    torchrun keeps one store for all attempts of a job: each has its own names in it, or ranks that were started again
    would find the addresses of those before them, and wait for ever. Raises
    RuntimeError where it is not there within so many seconds.
    """
    if "RANK" not in os.environ:
        return None
    store, *_ = next(dist.rendezvous("env://", timeout=timedelta(seconds=seconds)))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"attempt {attempt} of {os.environ['WORLD_SIZE']}", store)


_patience = timedelta(minutes=30)


def join(device: torch.device, store: dist.Store | None = None, seconds: float = 1800.0) -> tuple[int, int, int]:
    """Join the run's processes: (rank, world size, local rank). Gloo on CPU, NCCL on GPU.

    Under torchrun or DeepSpeed's launcher the environment says who we are; without one this is a run of one process,
    which needs no port. A second call returns the same. store: what `meet` gave. seconds: which a collective may take.
    """
    global _patience
    if not dist.is_initialized():
        _patience = timedelta(seconds=seconds)
        rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        os.environ.setdefault("LOCAL_RANK", "0")
        if "RANK" in os.environ:
            store = dist.PrefixStore("ranks", store or meet(seconds))
            if device.type == "cuda":
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        else:
            store, rank, world = dist.HashStore(), 0, 1
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=_patience)
    return dist.get_rank(), dist.get_world_size(), int(os.environ["LOCAL_RANK"])


def host_group() -> dist.ProcessGroup | None:
    """A gloo group of all ranks for objects of the host, with the patience that they joined with; None where the
    default group is one. All ranks must call it."""
    return dist.new_group(backend="gloo", timeout=_patience) if dist.get_backend() == "nccl" else None
