"""A transformer over the patches of an image in raster order, each told from those before it.

    x = RMSNorm([class tokens, W patches])                    K class tokens, one row of a table for each class
    x <- x + attention(RMSNorm(x));  x <- x + SwiGLU(RMSNorm(x))          in each block; a token reads those before it
    z_n = RMSNorm(x at the place before patch n) + target position n

Queries and keys are normed in each head and turned by the row and column of their patch; class tokens stand nowhere.
The design is SphereAR's (arXiv 2509.24335, there on latents) but for the norm of queries and keys, which is PixelDiT's
and ours to have here. In drawing, keys and values of the tokens so far are kept.
Shapes: B images, L patches of F numbers, K class tokens, D width, H heads of d.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from pixelgen_kernels import norm_modulate, qk_norm_rope
from torch import Tensor, nn

from pixelgen_fast.layers import Attention, Float32Tables, RMSNorm, SwiGLU, rope_2d_axial, small_, xavier_


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

    past: what came before; then x is one token, or the first tokens.
    """

    def forward(self, x_BLD: Tensor, cos: Tensor, sin: Tensor, past: KeysValues | None = None) -> Tensor:
        qkv = qk_norm_rope(self.qkv(x_BLD), self.q_norm.weight, self.k_norm.weight, cos, sin, self.num_heads)
        q, k, v = (tensor.transpose(1, 2) for tensor in qkv)
        if past is not None:
            k, v = past.extended(k, v)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1)
        return self.proj(rearrange(out, "B H L d -> B L (H d)"))


class CausalBlock(nn.Module):
    """Attention and SwiGLU with a norm before each; (x, branch) in and out, x + branch being the token stream."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = RMSNorm(dim)
        self.attn = CausalAttention(dim, num_heads)
        self.norm2 = RMSNorm(dim)
        self.mlp = SwiGLU(dim, int(2 * 4 * dim / 3))

    def forward(
        self, x: Tensor, branch: Tensor | None, cos: Tensor, sin: Tensor, past: KeysValues | None = None
    ) -> tuple[Tensor, Tensor]:
        h, x = norm(x, branch, self.norm1)
        h, x = norm(x, self.attn(h, cos, sin, past), self.norm2)
        return x, self.mlp(h)


class CausalTrunk(Float32Tables):
    """forward(patches [B, n, F], y int64 [B]) -> z [B, n + 1, D] of the first n + 1 patches, n < L.

    With `past`, which `past()` makes, it goes on: first with y, then without y and patch by patch; z is that of the
    patches behind the ones given. y = num_classes is no class.
    """

    def __init__(
        self, width: int, grid: int, num_classes: int, class_tokens: int, dim: int, depth: int, num_heads: int
    ) -> None:
        super().__init__()
        K = self.class_tokens = class_tokens
        self.y_embed = nn.Embedding(num_classes + 1, K * dim)
        self.enter, self.enter_norm = nn.Linear(width, dim), RMSNorm(dim)
        self.layers = nn.ModuleList(CausalBlock(dim, num_heads) for _ in range(depth))
        self.leave_norm = RMSNorm(dim)
        self.target_position = nn.Parameter(torch.empty(grid**2, dim))
        cos, sin = (table[:-1] for table in rope_2d_axial(grid, grid, dim // num_heads))
        self.register_buffer("rope_cos", F.pad(cos, (0, 0, K, 0), value=1.0), persistent=False)
        self.register_buffer("rope_sin", F.pad(sin, (0, 0, K, 0)), persistent=False)
        self.initialise()

    def initialise(self) -> None:
        xavier_(self)
        small_(self.y_embed.weight, self.target_position)

    def blocks(self) -> list[nn.Module]:
        return [*self.layers]

    def past(self, rows: int) -> list[KeysValues]:
        """What to keep of each block, empty yet."""
        attn = self.layers[0].attn
        shape = (rows, attn.num_heads, len(self.rope_cos), attn.q_norm.weight.shape[0])
        return [KeysValues(*shape, self.target_position) for _ in self.layers]

    def forward(self, patches_BnF: Tensor, y_B: Tensor | None = None, past: list[KeysValues] | None = None) -> Tensor:
        K, first = self.class_tokens, past[0].length if past else 0
        tokens = self.enter(patches_BnF)
        if y_B is not None:
            classes = rearrange(self.y_embed(y_B), "B (K D) -> B K D", K=K)
            tokens = torch.cat([classes, tokens], dim=1)
        end = first + tokens.shape[1]
        cos, sin = self.rope_cos[first:end], self.rope_sin[first:end]
        x, branch = norm(tokens, None, self.enter_norm)[0], None
        for block, kept in zip(self.layers, past or [None] * len(self.layers), strict=True):
            x, branch = block(x, branch, cos, sin, kept)
        x = norm(x, branch, self.leave_norm)[0]
        # the last class token and every patch tell the patch behind them
        target = max(first, K - 1)
        return x[:, target - first :] + self.target_position[target - K + 1 : end - K + 1]


def norm(x: Tensor, branch: Tensor | None, weight: RMSNorm) -> tuple[Tensor, Tensor]:
    """(RMSNorm of x + branch, x + branch): the shared operator, its modulation being none."""
    zero, one = (x.new_full((1, x.shape[-1]), value).expand(len(x), -1) for value in (0.0, 1.0))
    return norm_modulate(x, weight.weight, zero, zero, branch, None if branch is None else one)
