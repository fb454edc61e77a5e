"""The device that "auto" means, in every program alike."""

from __future__ import annotations

import os

import torch
from pixelgen_kernels.bodies import choose_body

from pixelgen_fast.errors import InputError


def choose_device(wanted: str = "auto") -> torch.device:
    """wanted: "auto", a GPU where there is one, or what torch.device takes. Raises InputError for CUDA without one."""
    there = torch.cuda.is_available()
    if wanted.startswith("cuda") and not there:
        raise InputError(f"run.device is {wanted}, but this machine has no usable CUDA device; use run.device=cpu")
    return torch.device(("cuda" if there else "cpu") if wanted == "auto" else wanted)


def drawing_device(wanted: str | None) -> str:
    """Where a command draws: of several GPUs, the one of this rank. None: a GPU where there is one.

    Raises ValueError where the operators cannot run there.
    """
    device = choose_device(wanted or "auto")
    choose_body(device.type)
    if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:
        return f"cuda:{os.environ['LOCAL_RANK']}"
    return str(device)
