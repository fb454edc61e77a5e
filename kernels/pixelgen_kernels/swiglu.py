"""Gated linear unit with SiLU, from a packed projection:  y = silu(a) * b,  (a | b) = packed.

"GLU Variants Improve Transformer" (arXiv 2002.05202) eq. 6. Shapes: packed [..., 2 F]; y [..., F].
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def swiglu_reference(packed: Tensor) -> Tensor:
    a, b = packed.chunk(2, dim=-1)
    return F.silu(a) * b


def swiglu(packed: Tensor) -> Tensor:
    """Return silu(first half) * second half, [..., F] in packed's dtype. Raises ValueError for an odd last size."""
    if packed.shape[-1] % 2:
        raise ValueError(f"swiglu needs an even last size (a | b), got {list(packed.shape)}")
    return swiglu_reference(packed)
