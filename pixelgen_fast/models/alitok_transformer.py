"""AliTok's transformer (arXiv 2506.05289): a class, then the tokens of an image, each told from all before it.

    x_0 = y_embed[y],  x_{j+1} = token_embed[id_j];        the logits at position j tell id_j
    logits = W RMSNorm(blocks(x)) + b                                              blocks of models/causal_blocks.py

Queries and keys are turned: the prefix by its place in a line, the grid behind it by row and column, which count on
from there. The class has no angle: its query and key are zero, so it scores 0 with everyone.
Shapes: B rows, N tokens an image, D width, V words; m positions so far.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixelgen_fast.layers import Float32Tables, rope_2d_axial, small_, swiglu_width, zero_
from pixelgen_fast.models.causal_blocks import CausalBlock, KeysValues, Norm, empty_past

EPS = 1e-5


class Head(nn.Module):
    """The last norm, and a score for each word. (x, branch) -> [B, L, V]."""

    def __init__(self, dim: int, words: int) -> None:
        super().__init__()
        self.norm = Norm(dim, EPS)
        self.linear = nn.Linear(dim, words)

    def forward(self, x: Tensor, branch: Tensor) -> Tensor:
        return self.linear(self.norm(x, branch)[0])


class TokenTransformer(Float32Tables):
    """forward(ids int64 [B, L], y int64 [B]) -> logits [B, L + 1, V], in the dtype of the weights; L up to N.

    words: V. y = num_classes is no class. prefix, grid: N = prefix + grid^2 tokens.
    """

    def __init__(
        self, words: int, num_classes: int, dim: int, num_heads: int, depth: int, prefix: int, grid: int, dropout: float
    ) -> None:
        super().__init__()
        self.dropout, self.null_class = dropout, num_classes
        # the published table has one row more than there are words, which nothing reads
        self.token_embed = nn.Embedding(words + 1, dim)
        self.y_embed = nn.Embedding(num_classes + 1, dim)
        self.blocks = nn.ModuleList(
            CausalBlock(dim, num_heads, swiglu_width(dim, 256), qkv_bias=True, dropout=dropout, eps=EPS)
            for _ in range(depth)
        )
        self.head = Head(dim, words)
        cos, sin = positions(prefix, grid, dim // num_heads)
        self.register_buffer("rope_cos", cos, persistent=False)
        self.register_buffer("rope_sin", sin, persistent=False)
        self.initialise()

    def initialise(self) -> None:
        """Weights of deviation 0.02 and zero biases, but a zero head: at first every word is as likely."""
        small_(self.token_embed.weight, self.y_embed.weight)
        for linear in (module for module in self.modules() if isinstance(module, nn.Linear)):
            small_(linear.weight)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        zero_([self.head.linear])

    def forward(self, ids: Tensor, y: Tensor) -> Tensor:
        x = torch.cat([self.y_embed(y)[:, None], self.token_embed(ids)], dim=1)
        x, branch = F.dropout(x, self.dropout, self.training), None
        cos, sin = self.rope_cos[: x.shape[1]], self.rope_sin[: x.shape[1]]
        for block in self.blocks:
            x, branch = block(x, branch, cos, sin)
        return self.head(x, branch)

    def past(self, rows: int) -> list[KeysValues]:
        """What to keep of each block for images of N tokens, empty yet."""
        return empty_past(self.blocks, rows, len(self.rope_cos))

    def extend(self, x_BD: Tensor, past: list[KeysValues], worth_Bm: Tensor | None = None) -> Tensor:
        """Logits [B, V] behind one more embedded class or token, which `past` then holds too; no dropout of it.

        worth: what the value of each position so far counts for, the new one's included.
        """
        place = past[0].length
        x, branch = x_BD[:, None], None
        cos, sin = self.rope_cos[place : place + 1], self.rope_sin[place : place + 1]
        for block, kept in zip(self.blocks, past, strict=True):
            x, branch = block(x, branch, cos, sin, kept, worth_Bm)
        return self.head(x, branch)[:, 0]


def positions(prefix: int, grid: int, head_dim: int, theta: float = 1e4) -> tuple[Tensor, Tensor]:
    """Rotary tables (cos, sin) of the class, the prefix and the grid, float32 [1 + prefix + grid^2, head_dim / 2]."""
    frequencies = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    line = torch.arange(float(prefix))[:, None] * frequencies
    cos, sin = rope_2d_axial(grid, grid, head_dim, theta, first=prefix)
    none = torch.zeros(1, head_dim // 2)
    return torch.cat([none, line.cos(), cos]), torch.cat([none, line.sin(), sin])
