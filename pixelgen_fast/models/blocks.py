"""The transformer blocks that the systems share, and the token stream between blocks.

    (x, branch, gate) -> x' = x + gate branch;  h = norm(x') modulated;  x'' = x' + gate1 attention(h);
                         h = norm(x'') modulated;  branch = SwiGLU(h), gate = gate2, both pending

AdaLN with six modulations of one condition (arXiv 2212.09748, section 3.2), rotary attention, SwiGLU. norm_modulate
takes one modulation for an image. Where every token has a condition of its own, a token is what an image is there:
x [T, 1, D], modulation [T, D].
Shapes: B batch, L tokens, D width, T = B L.
"""

from __future__ import annotations

from typing import ClassVar, NamedTuple

from einops import rearrange
from pixelgen_kernels import norm_modulate
from torch import Tensor, nn

from pixelgen_fast.layers import Attention, RMSNorm, SwiGLU, swiglu_width


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
    qk_norm: as Attention has it. modulated: False is a block without AdaLN, which reads no condition and whose gates
    are 1.
    """

    stacked: ClassVar[dict[str, int]] = {"modulation": 0}

    def __init__(
        self,
        dim: int,
        num_heads: int,
        bias: bool = False,
        dropout: float = 0.0,
        qk_norm: bool = True,
        modulated: bool = True,
    ) -> None:
        super().__init__()
        self.norm1 = RMSNorm(dim)
        self.attn = Attention(dim, num_heads, qkv_bias=bias, dropout=dropout, qk_norm=qk_norm)
        self.norm2 = RMSNorm(dim)
        self.mlp = SwiGLU(dim, swiglu_width(dim), bias=bias, dropout=dropout)
        self.modulation = nn.Linear(dim, 6 * dim) if modulated else None

    def forward(
        self, x: Tensor, branch: Tensor | None, gate: Tensor | None, c_BD: Tensor | None, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulations(x, c_BD)
        h, x = norm_modulate(x, self.norm1.weight, shift1, scale1, branch, gate)
        h, x = norm_modulate(x, self.norm2.weight, shift2, scale2, self.attend(h, cos, sin), gate1)
        return x, self.mlp(h), gate2

    def modulations(self, x: Tensor, c_BD: Tensor | None) -> tuple[Tensor, ...]:
        """Shift, scale and gate of the attention branch, then of the other, each [B, D]."""
        if self.modulation is not None:
            return self.modulation(c_BD).chunk(6, dim=-1)
        # one row for all images
        zero = x.new_zeros(1, x.shape[-1]).expand(len(x), -1)
        one = x.new_ones(1, x.shape[-1]).expand(len(x), -1)
        return zero, zero, one, zero, zero, one

    def attend(self, h: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """The attention branch of the normed tokens."""
        return self.attn(h, cos, sin)


class TokenBlock(TransformerBlock):
    """The same with a condition of every token; x [T, 1, D], c [T, D] after its SiLU. Images have len(cos) tokens."""

    def attend(self, h: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        h = rearrange(h, "(B L) 1 D -> B L D", L=len(cos))
        return rearrange(self.attn(h, cos, sin), "B L D -> (B L) 1 D")


class TokenHead(nn.Module):
    """RMSNorm, modulation of every token, Linear. Stream of x [T, 1, D], c [T, D] after its SiLU -> [T, 1, out]."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.norm = RMSNorm(dim)
        self.modulation = nn.Linear(dim, 2 * dim)
        self.linear = nn.Linear(dim, out)

    def forward(self, x: Tensor, branch: Tensor | None, gate: Tensor | None, c_TD: Tensor) -> Tensor:
        shift, scale = self.modulation(c_TD).chunk(2, dim=-1)
        return self.linear(norm_modulate(x, self.norm.weight, shift, scale, branch, gate)[0])


def flatten(x_BLD: Tensor) -> Tensor:
    """Tokens of all images in one list: [T, D]."""
    return rearrange(x_BLD, "B L D -> (B L) D")


def one_by_one(x_BLD: Tensor) -> TokenStream:
    """A stream whose tokens have conditions of their own."""
    return TokenStream(flatten(x_BLD)[:, None])


def by_image(stream: TokenStream, length: int) -> Tensor:
    """The tokens of a stream that has `length` of them an image: [B, length, D]."""
    return rearrange(stream.settle(), "(B N) 1 D -> B N D", N=length)
