"""Non-causal softmax attention:  out = softmax(q k^T / sqrt(d)) v  per head.

Shapes: q, k, v, out [B, L, H, d].
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def attention(q_BLHd: Tensor, k_BLHd: Tensor, v_BLHd: Tensor) -> Tensor:
    """Return [B, L, H, d] in q's dtype."""
    q, k, v = (x.transpose(1, 2) for x in (q_BLHd, k_BLHd, v_BLHd))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
