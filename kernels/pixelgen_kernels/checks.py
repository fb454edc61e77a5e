"""What the inputs of an operator must be: one check for all, which names the argument and the fix."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pixelgen_kernels.bodies import VARIABLE, body

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check(op: str, like: Tensor, *, rows: Sequence[str] = (), **wanted: tuple[Tensor, tuple[int, ...]]) -> None:
    """Check the inputs of operator `op`, given as name=(tensor, shape). Arguments named in `rows` need unit stride
    in their last dimension only; the others must be contiguous. All must be on the device of `like`.

    Raises ValueError naming the argument, what it is and what is needed.
    """
    device = like.device
    for name, (tensor, shape) in wanted.items():
        if tensor.shape != shape:
            raise ValueError(f"{op}: {name} must be {list(shape)}, got {list(tensor.shape)}")
        if tensor.dtype not in KERNEL_DTYPES and not (tensor.dtype == torch.float64 and body(like) == "reference"):
            raise ValueError(
                f"{op}: {name} must be float32, bfloat16 or float16, got {tensor.dtype}"
                + (f"; only {VARIABLE}=reference takes float64" if tensor.dtype == torch.float64 else "")
            )
        if tensor.device != device:
            raise ValueError(f"{op}: {name} must be on {device}, got {tensor.device}")
        if name in rows:
            if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
                raise ValueError(
                    f"{op}: {name} must have unit stride in its last dimension, got strides {tensor.stride()}; "
                    "call .contiguous() first"
                )
        elif not tensor.is_contiguous():
            raise ValueError(
                f"{op}: {name} must be contiguous, got {list(tensor.shape)} with strides {tensor.stride()}; "
                "call .contiguous() first"
            )
