"""The per-pixel half of a pixel block: residual of the attention branch, norm, modulation, MLP, residual.

gated (PixelDiT, arXiv 2511.20645):   modulation = (gate1 | shift2 | scale2 | gate2)
    m = x + gate1 * e
    y = m + gate2 * MLP(RMSNorm(m) * (1 + scale2) + shift2)
post (its stable variant):            modulation = (scale1 | shift1 | scale2 | shift2)
    m = x + e * (1 + scale1) + shift1
    y = m + MLP(RMSNorm(m)) * (1 + scale2) + shift2
with MLP(h) = W2 gelu(W1 h + b1) + b2. Statistics are float32.
Shapes: x, e, y [N, P, C]; modulation [N, P, 4 C]; norm weight [C]; W1 [F, C]; b1 [F]; W2 [C, F]; b2 [C].
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Gelu = Literal["none", "tanh"]


def pixel_mlp_reference(
    x_NPC: Tensor,
    e_NPC: Tensor,
    modulation: Tensor,
    weight_C: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    post: bool,
    gelu: Gelu,
    eps: float,
) -> Tensor:
    def mlp(h: Tensor) -> Tensor:
        return F.linear(F.gelu(F.linear(h, w1, b1), approximate=gelu), w2, b2)

    def norm(m: Tensor) -> Tensor:
        statistics = torch.promote_types(m.dtype, torch.float32)
        return F.rms_norm(m.to(statistics), weight_C.shape, weight_C.to(statistics), eps)

    if post:
        scale1, shift1, scale2, shift2 = modulation.chunk(4, dim=-1)
        m_NPC = x_NPC + e_NPC * (1.0 + scale1) + shift1
        return m_NPC + mlp(norm(m_NPC).to(x_NPC.dtype)) * (1.0 + scale2) + shift2
    gate1, shift2, scale2, gate2 = modulation.chunk(4, dim=-1)
    m_NPC = x_NPC + gate1 * e_NPC
    return m_NPC + gate2 * mlp((norm(m_NPC) * (1.0 + scale2) + shift2).to(x_NPC.dtype))


def pixel_mlp(
    x_NPC: Tensor,
    e_NPC: Tensor,
    modulation: Tensor,
    weight_C: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    *,
    post: bool = False,
    gelu: Gelu = "none",
    eps: float = 1e-6,
) -> Tensor:
    """Return y [N, P, C] in x's dtype. gelu: "none" for the exact error function, "tanh" for its approximation.

    Raises ValueError when a shape does not fit.
    """
    N, P, C = x_NPC.shape
    hidden = w1.shape[0]
    wanted = {"e": (N, P, C), "modulation": (N, P, 4 * C), "weight": (C,), "w1": (hidden, C), "b1": (hidden,)}
    given = {"e": e_NPC, "modulation": modulation, "weight": weight_C, "w1": w1, "b1": b1}
    wanted |= {"w2": (C, hidden), "b2": (C,)}
    given |= {"w2": w2, "b2": b2}
    for name, shape in wanted.items():
        if given[name].shape != shape:
            raise ValueError(f"pixel_mlp: {name} must be {list(shape)}, got {list(given[name].shape)}")
    return pixel_mlp_reference(x_NPC, e_NPC, modulation, weight_C, w1, b1, w2, b2, post, gelu, eps)
