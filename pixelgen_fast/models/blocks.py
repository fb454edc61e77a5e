"""The transformer block that the systems share, and the token stream between blocks.

    (x, branch, gate) -> x' = x + gate branch;  h = norm(x') modulated;  x'' = x' + gate1 attention(h);
                         h = norm(x'') modulated;  branch = SwiGLU(h), gate = gate2, both pending

AdaLN with six modulations of one condition (arXiv 2212.09748, section 3.2), rotary attention with QK-norm, SwiGLU.
Shapes: B batch, L tokens, D width.
"""

from __future__ import annotations

from typing import NamedTuple

from pixelgen_kernels import norm_modulate
from torch import Tensor, nn

from pixelgen_fast.layers import Attention, RMSNorm, SwiGLU


class TokenStream(NamedTuple):
    """The token stream x [B, L, D] with a pending x += gate * branch, which the next norm folds in."""

    x: Tensor
    branch: Tensor | None = None
    gate: Tensor | None = None

    def settle(self) -> Tensor:
        return self.x if self.branch is None else self.x + self.gate[:, None] * self.branch


class TransformerBlock(nn.Module):
    """Transformer block with AdaLN, rotary attention and SwiGLU; (x, branch, gate) in and out.

    The condition c [B, D] comes after its SiLU. bias: of all products. dropout: in training, in both branches.
    """

    def __init__(self, dim: int, num_heads: int, bias: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1 = RMSNorm(dim)
        self.attn = Attention(dim, num_heads, qkv_bias=bias, dropout=dropout)
        self.norm2 = RMSNorm(dim)
        self.mlp = SwiGLU(dim, int(2 * 4 * dim / 3), bias=bias, dropout=dropout)
        self.modulation = nn.Linear(dim, 6 * dim)

    def forward(
        self, x: Tensor, branch: Tensor | None, gate: Tensor | None, c_BD: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c_BD).chunk(6, dim=-1)
        h, x = norm_modulate(x, self.norm1.weight, shift1, scale1, branch, gate)
        h, x = norm_modulate(x, self.norm2.weight, shift2, scale2, self.attend(h, cos, sin), gate1)
        return x, self.mlp(h), gate2

    def attend(self, h: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """The attention branch of the normed tokens."""
        return self.attn(h, cos, sin)
