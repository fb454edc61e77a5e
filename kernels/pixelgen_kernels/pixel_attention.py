"""Global attention of the pixel head over compacted patch tokens, as one composed operator.

    h = pixel_modulate(x)           per-pixel RMSNorm and modulation
    s = W_c flat(h) + b_c           compaction: the P C numbers of a patch become one token of width D
    q, k, v = qk_norm_rope(W_qkv s)
    e = W_e (W_o attention(q, k, v) + b_o) + b_e        expansion back to P pixels of C channels

PixelDiT (arXiv 2511.20645) section 3.2, pixel token compaction: attention over L tokens instead of L P pixels.
Besides its inputs, backward keeps h and eight tensors of the tokens' size (s; q, k, v before and q, k after the norm;
attention and its projection), P C + 8 D numbers a patch; save="recompute" keeps none of them and runs forward again.
Shapes: x, e [N, P, C] with N = B L; modulation [N, P, 2 C] or None; W_c [D, P C];
    W_qkv [3 D, D]; W_o [D, D]; W_e [P C, D].
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pixelgen_kernels.attention import attention_reference
from pixelgen_kernels.checks import check
from pixelgen_kernels.layers import attention_layer
from pixelgen_kernels.pixel_modulate import pixel_modulate, pixel_modulate_reference
from pixelgen_kernels.qk_norm_rope import qk_norm_rope_reference

Save = Literal["store", "recompute"]


class PixelAttentionWeights(NamedTuple):
    """norm_weight [C]; compress [D, P C], [D]; qkv [3 D, D]; q_norm_weight, k_norm_weight [d]; proj [D, D], [D];
    expand [P C, D], [P C]."""

    norm_weight: Tensor
    compress_weight: Tensor
    compress_bias: Tensor
    qkv_weight: Tensor
    q_norm_weight: Tensor
    k_norm_weight: Tensor
    proj_weight: Tensor
    proj_bias: Tensor
    expand_weight: Tensor
    expand_bias: Tensor


def pixel_attention_reference(
    x_NPC: Tensor,
    modulation: Tensor | None,
    w: PixelAttentionWeights,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    eps: float = 1e-6,
) -> Tensor:
    h_NPC = pixel_modulate_reference(x_NPC, w.norm_weight, modulation, eps)
    tokens = rearrange(h_NPC, "(B L) P C -> B L (P C)", L=cos.shape[0]).to(w.compress_weight.dtype)
    tokens = F.linear(tokens, w.compress_weight, w.compress_bias)
    q, k, v = qk_norm_rope_reference(
        F.linear(tokens, w.qkv_weight), w.q_norm_weight, w.k_norm_weight, cos, sin, heads, eps
    )
    mixed = F.linear(attention_reference(q, k, v).flatten(2), w.proj_weight, w.proj_bias)
    return F.linear(mixed, w.expand_weight, w.expand_bias).view(x_NPC.shape)


def _pixel_attention(
    x_NPC: Tensor, modulation: Tensor | None, cos: Tensor, sin: Tensor, heads: int, eps: float, *weights: Tensor
) -> Tensor:
    w = PixelAttentionWeights(*weights)
    h_NPC = pixel_modulate(x_NPC, w.norm_weight, modulation, eps)
    tokens = rearrange(h_NPC, "(B L) P C -> B L (P C)", L=cos.shape[0]).to(w.compress_weight.dtype)
    tokens = F.linear(tokens, w.compress_weight, w.compress_bias)
    mixed = attention_layer(
        tokens, w.qkv_weight, w.q_norm_weight, w.k_norm_weight, w.proj_weight, w.proj_bias, cos, sin, heads, eps
    )
    return F.linear(mixed, w.expand_weight, w.expand_bias).view(x_NPC.shape)


def pixel_attention(
    x_NPC: Tensor,
    modulation: Tensor | None,
    w: PixelAttentionWeights,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    *,
    save: Save = "store",
    eps: float = 1e-6,
) -> Tensor:
    """Return e [N, P, C] in the type of w's projections, which share one; x may have another.

    cos, sin: rotary tables [L, d / 2], constants; L divides N. save: what backward keeps, see above. Contiguous
    tensors. Raises ValueError naming what does not fit, also when N is not a whole number of images.
    """
    if x_NPC.ndim != 3 or cos.ndim != 2 or w.compress_weight.ndim != 2:
        raise ValueError(
            "pixel_attention: x must be [N, P, C], cos [L, d / 2] and compress_weight [D, P C], "
            f"got {list(x_NPC.shape)}, {list(cos.shape)}, {list(w.compress_weight.shape)}"
        )
    if save not in get_args(Save):
        raise ValueError(f"pixel_attention: save must be one of {', '.join(get_args(Save))}, got {save!r}")
    (N, P, C), (L, half), D = x_NPC.shape, cos.shape, w.compress_weight.shape[0]
    if N % L:
        raise ValueError(f"pixel_attention: {N} patches are not a whole number of images of {L} patches")
    if 2 * half * heads != D:
        raise ValueError(
            f"pixel_attention: width {D} with {heads} heads needs tables [{L}, {D / (2 * heads):g}], "
            f"got {list(cos.shape)}"
        )
    shapes = {
        "compress_weight": (D, P * C),
        "compress_bias": (D,),
        "qkv_weight": (3 * D, D),
        "proj_weight": (D, D),
        "proj_bias": (D,),
        "expand_weight": (P * C, D),
        "expand_bias": (P * C,),
    }
    check("pixel_attention", x_NPC, **{name: (getattr(w, name), shape) for name, shape in shapes.items()})
    for name in shapes:
        if getattr(w, name).dtype != w.compress_weight.dtype:
            raise ValueError(
                f"pixel_attention: {name} must be {w.compress_weight.dtype} like compress_weight, "
                f"got {getattr(w, name).dtype}"
            )
    arguments = (x_NPC, modulation, cos, sin, heads, eps, *w)
    if save == "recompute" and torch.is_grad_enabled():
        # nothing here draws random numbers, so there is no generator state to keep
        return checkpoint(_pixel_attention, *arguments, use_reentrant=False, preserve_rng_state=False)
    return _pixel_attention(*arguments)
