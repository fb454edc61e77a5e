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
from torch import Tensor, nn

from pixelgen_fast.layers import Float32Tables, rope_2d_axial, small_, swiglu_width, xavier_
from pixelgen_fast.models.causal_blocks import CausalBlock, KeysValues, Norm, empty_past


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
        self.enter, self.enter_norm = nn.Linear(width, dim), Norm(dim)
        self.layers = nn.ModuleList(CausalBlock(dim, num_heads, swiglu_width(dim)) for _ in range(depth))
        self.leave_norm = Norm(dim)
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
        return empty_past(self.layers, rows, len(self.rope_cos))

    def forward(self, patches_BnF: Tensor, y_B: Tensor | None = None, past: list[KeysValues] | None = None) -> Tensor:
        K, first = self.class_tokens, past[0].length if past else 0
        tokens = self.enter(patches_BnF)
        if y_B is not None:
            classes = rearrange(self.y_embed(y_B), "B (K D) -> B K D", K=K)
            tokens = torch.cat([classes, tokens], dim=1)
        end = first + tokens.shape[1]
        cos, sin = self.rope_cos[first:end], self.rope_sin[first:end]
        x, branch = self.enter_norm(tokens)[0], None
        for block, kept in zip(self.layers, past or [None] * len(self.layers), strict=True):
            x, branch = block(x, branch, cos, sin, kept)
        x = self.leave_norm(x, branch)[0]
        # the last class token and every patch tell the patch behind them
        target = max(first, K - 1)
        return x[:, target - first :] + self.target_position[target - K + 1 : end - K + 1]
