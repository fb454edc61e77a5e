"""The device that "auto" means, in every program alike."""

from __future__ import annotations

import torch

from pixelgen_fast.errors import InputError


def choose_device(wanted: str = "auto") -> torch.device:
    """wanted: "auto", a GPU where there is one, or what torch.device takes. Raises InputError for CUDA without one."""
    there = torch.cuda.is_available()
    if wanted.startswith("cuda") and not there:
        raise InputError(f"run.device is {wanted}, but this machine has no usable CUDA device; use run.device=cpu")
    return torch.device(("cuda" if there else "cpu") if wanted == "auto" else wanted)
