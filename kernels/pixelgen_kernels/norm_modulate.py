"""Residual, RMSNorm and adaptive modulation of the token stream, in one operator.

    x' = x + gate * branch                                  (when a branch is pending)
    y  = x' / sqrt(mean(x'^2) + eps) * weight * (1 + scale) + shift

The statistics are float32. PixelDiT (arXiv 2511.20645) section 3; AdaLN from DiT (arXiv 2212.09748) section 3.2.
Shapes: x, branch [B, L, D]; weight [D]; shift, scale, gate [B, D], any row stride.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def norm_modulate_reference(
    x_BLD: Tensor,
    weight_D: Tensor,
    shift_BD: Tensor,
    scale_BD: Tensor,
    branch_BLD: Tensor | None,
    gate_BD: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    if branch_BLD is not None:
        x_BLD = x_BLD + gate_BD[:, None] * branch_BLD
    statistics = torch.promote_types(x_BLD.dtype, torch.float32)
    norm_BLD = F.rms_norm(x_BLD.to(statistics), weight_D.shape, weight_D.to(statistics), eps)
    y_BLD = norm_BLD * (1.0 + scale_BD[:, None]) + shift_BD[:, None]
    return y_BLD.to(x_BLD.dtype), x_BLD


def norm_modulate(
    x_BLD: Tensor,
    weight_D: Tensor,
    shift_BD: Tensor,
    scale_BD: Tensor,
    branch_BLD: Tensor | None = None,
    gate_BD: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Return (y, x'), both [B, L, D] in x's dtype. branch and gate are given together or not at all.

    Raises ValueError when only one of branch and gate is given, or when a shape does not fit.
    """
    B, L, D = x_BLD.shape
    if (branch_BLD is None) != (gate_BD is None):
        raise ValueError("norm_modulate needs branch and gate together, got only one of them")
    if weight_D.shape != (D,) or shift_BD.shape != (B, D) or scale_BD.shape != (B, D):
        raise ValueError(
            f"norm_modulate: x [{B}, {L}, {D}] needs weight [{D}] and shift, scale [{B}, {D}], "
            f"got {list(weight_D.shape)}, {list(shift_BD.shape)}, {list(scale_BD.shape)}"
        )
    return norm_modulate_reference(x_BLD, weight_D, shift_BD, scale_BD, branch_BLD, gate_BD, eps)
