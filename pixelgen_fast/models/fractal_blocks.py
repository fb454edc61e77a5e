"""The causal transformer blocks of FractalGen (arXiv 2502.17437): of colors, and of patches in raster order.

    ColorBlock   x <- x + attention(LayerNorm(x)),  x <- x + W2 gelu(W1 LayerNorm(x))    that of layers.ViTBlock, causal
    LlamaBlock   x <- x + attention(RMSNorm(x)),    x <- x + SwiGLU(RMSNorm(x))          no bias, rotary, causal

The second is LlamaGen's (arXiv 2406.06525). Drawing patch by patch, it keeps keys and values of those before.
Shapes: M rows, L tokens, D width, H heads of d.
"""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from einops import rearrange
from pixelgen_kernels import rotate
from torch import Tensor, nn

from pixelgen_fast.errors import InputError
from pixelgen_fast.layers import SwiGLU, ViTBlock, swiglu_width
from pixelgen_fast.models.causal_blocks import KeysValues

LAYER_NORM_EPS, RMS_NORM_EPS = 1e-6, 1e-5


class ColorBlock(ViTBlock):
    """The plain block, each token reading itself and those before it; no dropout."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__(dim, num_heads, 4 * dim, LAYER_NORM_EPS)

    def attend(self, qkv: Tensor, seen_BL: Tensor | None) -> Tensor:
        q, k, v = rearrange(qkv, "M L (n H d) -> n M H L d", n=3, H=self.num_heads)
        return rearrange(F.scaled_dot_product_attention(q, k, v, is_causal=True), "M H L d -> M L (H d)")


class LlamaAttention(nn.Module):
    """Causal attention with rotary embedding; a token whose cos and sin are zero scores 0 with every other.

    cos, sin: [L, d / 2]. past: of the tokens before, when x is one more.
    """

    stacked: ClassVar[dict[str, int]] = {"qkv": 3}

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        if dim % (4 * num_heads):
            raise InputError(
                f"hidden size {dim} over {num_heads} heads gives head size {dim / num_heads}; "
                "2D rotary embedding needs a whole multiple of 4"
            )
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim, bias=False)

    def forward(self, x_MLD: Tensor, cos: Tensor, sin: Tensor, past: KeysValues | None = None) -> Tensor:
        q, k, v = rearrange(self.qkv(x_MLD), "M L (n H d) -> n M L H d", n=3, H=self.num_heads)
        q, k, v = (tensor.transpose(1, 2) for tensor in (rotate(q, cos, sin), rotate(k, cos, sin), v))
        if past is not None:
            k, v = past.extended(k, v)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=past is None)
        return self.proj(rearrange(out, "M H L d -> M L (H d)"))


class LlamaBlock(nn.Module):
    """[M, L, D] -> [M, L, D]. dropout: in training, of what both branches add."""

    def __init__(self, dim: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = dropout
        self.norm1 = nn.RMSNorm(dim, eps=RMS_NORM_EPS)
        self.attn = LlamaAttention(dim, num_heads)
        self.norm2 = nn.RMSNorm(dim, eps=RMS_NORM_EPS)
        self.mlp = SwiGLU(dim, swiglu_width(dim, 256))

    def forward(self, x_MLD: Tensor, cos: Tensor, sin: Tensor, past: KeysValues | None = None) -> Tensor:
        h = self.attn(self.norm1(x_MLD), cos, sin, past)
        x_MLD = x_MLD + F.dropout(h, self.dropout, self.training)
        return x_MLD + F.dropout(self.mlp(self.norm2(x_MLD)), self.dropout, self.training)

    def past(self, rows: int, tokens: int) -> KeysValues:
        """An empty cache for so many tokens."""
        heads, like = self.attn.num_heads, self.attn.proj.weight
        return KeysValues(rows, heads, tokens, len(like) // heads, like)
