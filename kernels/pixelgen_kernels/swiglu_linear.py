"""The second half of a SwiGLU feed-forward layer, keeping its packed input only:  out = W (silu(a) * b).

Autograd would keep silu(a) * b for the gradient of W, a third of what this layer saves; here the kernel that turns the
gradient of silu(a) * b into that of (a | b) writes it again on the way.
Shapes: packed [..., 2 F] as (a | b); W [D, F]; out [..., D].
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pixelgen_kernels import library
from pixelgen_kernels.swiglu import swiglu


class _SwiGLULinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, packed: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(packed, weight)
        return F.linear(library.compiled(packed).swiglu(packed), weight)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor]:
        packed, weight = ctx.saved_tensors
        dpacked, y = library.compiled(packed).swiglu_backward(dout @ weight, packed)
        return dpacked, dout.flatten(0, -2).t() @ y.flatten(0, -2)


def swiglu_linear(packed: Tensor, weight: Tensor) -> Tensor:
    """Return [..., D] in packed's dtype. Raises ValueError when packed and weight do not fit; see `swiglu`."""
    if packed.shape[-1] != 2 * weight.shape[1] or packed.dtype != weight.dtype:
        raise ValueError(
            f"swiglu_linear: packed {list(packed.shape)} {packed.dtype} does not fit weight {list(weight.shape)} "
            f"{weight.dtype}; packed needs twice the weight's columns and its dtype"
        )
    if library.compiled(packed) is None:
        return F.linear(swiglu(packed), weight)
    return _SwiGLULinear.apply(packed, weight)
