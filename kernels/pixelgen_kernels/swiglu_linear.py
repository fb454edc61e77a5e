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

from pixelgen_kernels.bodies import Body, body
from pixelgen_kernels.swiglu import swiglu, swiglu_backward, swiglu_forward


class _SwiGLULinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, packed: Tensor, weight: Tensor, body: Body) -> Tensor:
        ctx.save_for_backward(packed, weight)
        ctx.body = body
        return F.linear(swiglu_forward(packed, body=body), weight)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor, None]:
        packed, weight = ctx.saved_tensors
        dpacked, y = swiglu_backward(dout @ weight, packed, body=ctx.body)
        return dpacked, dout.flatten(0, -2).t() @ y.flatten(0, -2), None


def swiglu_linear(packed: Tensor, weight: Tensor) -> Tensor:
    """Return [..., D] in packed's dtype. Raises ValueError when packed and weight do not fit; see `swiglu`."""
    if packed.shape[-1] != 2 * weight.shape[1] or packed.dtype != weight.dtype:
        raise ValueError(
            f"swiglu_linear: packed {list(packed.shape)} {packed.dtype} does not fit weight {list(weight.shape)} "
            f"{weight.dtype}; packed needs twice the weight's columns and its dtype"
        )
    chosen = body(packed)
    if chosen == "reference":
        return F.linear(swiglu(packed), weight)
    return _SwiGLULinear.apply(packed, weight, chosen)
