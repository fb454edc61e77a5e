"""RMSNorm over the channels of each pixel and its own modulation.

    y = x / sqrt(mean_C(x^2) + eps) * weight * (1 + scale) + shift         with (shift, scale) = modulation
    y = x / sqrt(mean_C(x^2) + eps) * weight                               without

PixelDiT (arXiv 2511.20645) section 3.2, pixel-wise AdaLN. The statistics are float32.
Shapes: x [N, P, C], N = B L patches of P pixels; weight [C]; modulation [N, P, 2 C] as (shift | scale).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def pixel_modulate_reference(x_NPC: Tensor, weight_C: Tensor, modulation: Tensor | None, eps: float) -> Tensor:
    statistics = torch.promote_types(x_NPC.dtype, torch.float32)
    y_NPC = F.rms_norm(x_NPC.to(statistics), weight_C.shape, weight_C.to(statistics), eps)
    if modulation is not None:
        shift_NPC, scale_NPC = modulation.chunk(2, dim=-1)
        y_NPC = y_NPC * (1.0 + scale_NPC) + shift_NPC
    return y_NPC.to(x_NPC.dtype)


def pixel_modulate(x_NPC: Tensor, weight_C: Tensor, modulation: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """Return [N, P, C] in x's dtype. Raises ValueError when a shape does not fit."""
    N, P, C = x_NPC.shape
    if weight_C.shape != (C,) or (modulation is not None and modulation.shape != (N, P, 2 * C)):
        raise ValueError(
            f"pixel_modulate: x [{N}, {P}, {C}] needs weight [{C}] and modulation [{N}, {P}, {2 * C}], "
            f"got {list(weight_C.shape)}, {None if modulation is None else list(modulation.shape)}"
        )
    return pixel_modulate_reference(x_NPC, weight_C, modulation, eps)
