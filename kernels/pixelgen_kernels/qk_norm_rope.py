"""Per-head RMSNorm of queries and keys and rotary position embedding, straight from the packed projection.

    q' = RMSNorm(q) * weight,   (a, b) -> (a cos - b sin, a sin + b cos) for each pair (a, b) of consecutive features

Statistics and rotation are float32. RoFormer (arXiv 2104.09864) eq. 34; QK-norm (arXiv 2010.04245).
Shapes: qkv [B, L, 3 H d] packed as (q, k, v) x heads x features; weights [d]; cos, sin [L, d / 2]; out [B, L, H, d].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


def qk_norm_rope_reference(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, heads: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = rearrange(qkv, "B L (three H d) -> three B L H d", three=3, H=heads)
    return _norm_rotate(q, q_weight, cos, sin, eps), _norm_rotate(k, k_weight, cos, sin, eps), v


def _norm_rotate(x_BLHd: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    statistics = torch.promote_types(x_BLHd.dtype, torch.float32)
    norm = F.rms_norm(x_BLHd.to(statistics), weight.shape, weight.to(statistics), eps)
    a, b = norm[..., 0::2], norm[..., 1::2]
    cos, sin = cos[:, None], sin[:, None]
    rotated = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1)
    return rotated.flatten(-2).to(x_BLHd.dtype)


def qk_norm_rope(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, heads: int, eps: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k, v, each [B, L, H, d] in qkv's dtype; v is a view of qkv.

    Raises ValueError when the packed width is not 3 * heads * d with an even d, or the tables do not cover L.
    """
    L, width = qkv.shape[1:]
    if width % (3 * heads) or q_weight.shape != (width // (3 * heads),) or q_weight.shape[0] % 2:
        raise ValueError(
            f"qk_norm_rope: packed width {width} with {heads} heads needs norm weights of size {width / (3 * heads)} "
            f"(even), got {list(q_weight.shape)}"
        )
    if cos.shape != (L, q_weight.shape[0] // 2) or sin.shape != cos.shape:
        raise ValueError(f"qk_norm_rope: {L} tokens need tables [{L}, {q_weight.shape[0] // 2}], got {list(cos.shape)}")
    return qk_norm_rope_reference(qkv, q_weight, k_weight, cos, sin, heads, eps)
