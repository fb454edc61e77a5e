"""Blocks of transformers over a row of tokens, each reading those before it, and what they keep while a row is drawn.

    x <- x + attention(RMSNorm(x));  x <- x + SwiGLU(RMSNorm(x))

Queries and keys are normed in each head and turned. In drawing, keys and values of the tokens so far are kept, and the
value of a token may count for less than it is.
Shapes: B rows, L tokens, m of them so far, D width, H heads of d.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from pixelgen_kernels import norm_modulate, qk_norm_rope
from torch import Tensor, nn

from pixelgen_fast.layers import Attention, RMSNorm, SwiGLU


class KeysValues:
    """Keys and values of one block for the tokens so far: the first `length` of [B, H, N, d]."""

    def __init__(self, rows: int, heads: int, tokens: int, head_dim: int, like: Tensor) -> None:
        self.keys = like.new_empty(rows, heads, tokens, head_dim)
        self.values, self.length = torch.empty_like(self.keys), 0

    def extended(self, k_BHLd: Tensor, v_BHLd: Tensor) -> tuple[Tensor, Tensor]:
        """Those of all tokens, with the ones given behind the ones before."""
        end = self.length + k_BHLd.shape[2]
        self.keys[:, :, self.length : end], self.values[:, :, self.length : end] = k_BHLd, v_BHLd
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]


class CausalAttention(Attention):
    """The shared attention, each token reading itself and those before it.

    past: what came before; then x is one token, or the first tokens. worth: what the value of each token so far is
    multiplied by. dropout: in training, of the shares of attention and of the output. eps: of the norms.
    """

    def __init__(
        self, dim: int, num_heads: int, qkv_bias: bool = False, dropout: float = 0.0, eps: float = 1e-6
    ) -> None:
        super().__init__(dim, num_heads, qkv_bias, dropout)
        self.eps = eps

    def forward(
        self,
        x_BLD: Tensor,
        cos: Tensor,
        sin: Tensor,
        past: KeysValues | None = None,
        worth_Bm: Tensor | None = None,
    ) -> Tensor:
        weights = self.q_norm.weight, self.k_norm.weight
        qkv = qk_norm_rope(self.qkv(x_BLD), *weights, cos, sin, self.num_heads, self.eps)
        q, k, v = (tensor.transpose(1, 2) for tensor in qkv)
        if past is not None:
            k, v = past.extended(k, v)
        if worth_Bm is not None:
            v = (v * worth_Bm[:, None, :, None]).to(v.dtype)
        dropout = self.dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=q.shape[2] > 1)
        return F.dropout(self.proj(rearrange(out, "B H L d -> B L (H d)")), self.dropout, self.training)


class Norm(RMSNorm):
    """(RMSNorm of x + branch, x + branch), each [B, L, D]: the shared operator, its modulation being none."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__(dim)
        self.eps = eps

    def forward(self, x: Tensor, branch: Tensor | None = None) -> tuple[Tensor, Tensor]:
        zero, one = (x.new_full((1, x.shape[-1]), value).expand(len(x), -1) for value in (0.0, 1.0))
        return norm_modulate(x, self.weight, zero, zero, branch, None if branch is None else one, self.eps)


class CausalBlock(nn.Module):
    """Attention and SwiGLU with a norm before each; (x, branch) in and out, x + branch being the token stream.

    hidden: width of the SwiGLU. dropout: in training, of both branches, and as CausalAttention has it.
    """

    def __init__(
        self, dim: int, num_heads: int, hidden: int, qkv_bias: bool = False, dropout: float = 0.0, eps: float = 1e-6
    ) -> None:
        super().__init__()
        self.dropout = dropout
        self.norm1 = Norm(dim, eps)
        self.attn = CausalAttention(dim, num_heads, qkv_bias, dropout, eps)
        self.norm2 = Norm(dim, eps)
        self.mlp = SwiGLU(dim, hidden)

    def forward(
        self,
        x: Tensor,
        branch: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        past: KeysValues | None = None,
        worth_Bm: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        h, x = self.norm1(x, branch)
        h, x = self.norm2(x, self.attn(h, cos, sin, past, worth_Bm))
        return x, F.dropout(self.mlp(h), self.dropout, self.training)


def empty_past(blocks: nn.ModuleList, rows: int, tokens: int) -> list[KeysValues]:
    """What to keep of each block for rows of so many tokens, empty yet."""
    attn = blocks[0].attn
    shape = (rows, attn.num_heads, tokens, attn.q_norm.weight.shape[0])
    return [KeysValues(*shape, attn.qkv.weight) for _ in blocks]
