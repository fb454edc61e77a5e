"""Global attention of the pixel head over compacted patch tokens, as one composed operator.

    h = pixel_modulate(x)           per-pixel RMSNorm and modulation
    s = W_c flat(h) + b_c           compaction: the P C numbers of a patch become one token of width D
    q, k, v = qk_norm_rope(W_qkv s)
    e = W_e (W_o attention(q, k, v) + b_o) + b_e        expansion back to P pixels of C channels

PixelDiT (arXiv 2511.20645) section 3.2, pixel token compaction: attention over L tokens instead of L P pixels.
Shapes: x, e [N, P, C] with N = B L; modulation [N, P, 2 C] or None; W_c [D, P C];
    W_qkv [3 D, D]; W_o [D, D]; W_e [P C, D].
"""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from pixelgen_kernels.attention import attention
from pixelgen_kernels.pixel_modulate import pixel_modulate
from pixelgen_kernels.qk_norm_rope import qk_norm_rope


class PixelAttentionWeights(NamedTuple):
    """norm [C]; compress [D, P C], [D]; qkv [3 D, D]; q_norm, k_norm [d]; proj [D, D], [D]; expand [P C, D], [P C]."""

    norm: Tensor
    compress_weight: Tensor
    compress_bias: Tensor
    qkv_weight: Tensor
    q_norm: Tensor
    k_norm: Tensor
    proj_weight: Tensor
    proj_bias: Tensor
    expand_weight: Tensor
    expand_bias: Tensor


def pixel_attention(
    x_NPC: Tensor, modulation: Tensor | None, w: PixelAttentionWeights, cos: Tensor, sin: Tensor, heads: int
) -> Tensor:
    """Return e [N, P, C] in x's dtype. cos, sin: rotary tables [L, d / 2]; L divides N.

    Raises ValueError when N is not a whole number of images.
    """
    N, P, C = x_NPC.shape
    L = cos.shape[0]
    if N % L:
        raise ValueError(f"pixel_attention: {N} patches are not a whole number of images of {L} patches")
    h_NPC = pixel_modulate(x_NPC, w.norm, modulation)
    tokens = rearrange(h_NPC, "(B L) P C -> B L (P C)", L=L)
    tokens = F.linear(tokens, w.compress_weight, w.compress_bias)
    q, k, v = qk_norm_rope(F.linear(tokens, w.qkv_weight), w.q_norm, w.k_norm, cos, sin, heads)
    mixed = F.linear(attention(q, k, v).flatten(2), w.proj_weight, w.proj_bias)
    return F.linear(mixed, w.expand_weight, w.expand_bias).view(N, P, C)
