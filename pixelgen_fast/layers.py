"""Layers shared by the transformers of this package, and their position tables.

Rotary tables follow PixelDiT, whose positions span the same interval at any resolution, or EVA-02 (arXiv 2303.11331),
whose positions are whole numbers. The fixed sine-cosine embedding is MAE's (arXiv 2111.06377). Names follow timm.
Shapes: B batch, L tokens, D width, H heads, d = D / H.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from pixelgen_kernels import (
    attention,
    attention_layer,
    noised_patch_projection,
    patch_projection,
    qk_norm_rope,
    rotate,
    swiglu,
    swiglu_layer,
    swiglu_linear,
)
from pixelgen_kernels.bodies import body
from torch import Tensor, nn

from pixelgen_fast.diffusion.path import Noising
from pixelgen_fast.errors import InputError


class RMSNorm(nn.Module):
    """The weight of a root-mean-square norm [D]; the fused operators that apply it take the weight itself."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))


class Float32Tables(nn.Module):
    """A module whose buffers follow it to a device but keep float32 when it is cast: rotary angles need the digits."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        tables = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, table in tables.items():
            if table is None:  # a buffer that this module has none of
                continue
            self._buffers[name] = table.to(self._buffers[name].device)
        return self


class PatchEmbed(nn.Linear):
    """Linear embedding of p x p patches.

    forward(z [B, 3, S, S]) -> tokens [B, L, D], pixels of z [B, L, P, 3]
    forward(images uint8 [B, S, S, 3], noising) -> tokens, pixels of z, velocity x - noise_scale e [B, L, P, 3]
    """

    def __init__(self, patch_size: int, dim: int) -> None:
        super().__init__(3 * patch_size**2, dim)
        self.patch_size = patch_size

    def forward(self, images: Tensor, noising: Noising | None = None) -> tuple[Tensor, ...]:
        if noising is None:
            return patch_projection(images, self.weight, self.bias, self.patch_size)
        return noised_patch_projection(
            images,
            noising.numbers,
            noising.t,
            self.weight,
            self.bias,
            patch=self.patch_size,
            seed=noising.seed,
            noise_scale=noising.noise_scale,
        )


class Attention(nn.Module):
    """Self-attention with a packed projection, QK-norm and rotary embedding. [B, L, D] -> [B, L, D].

    dropout: in training, of the output. qk_norm: False rotates queries and keys as they are.
    stacked, here and below: how many matrices the weight of a child packs (models/matrices.py).
    """

    stacked: ClassVar[dict[str, int]] = {"qkv": 3}

    def __init__(
        self, dim: int, num_heads: int, qkv_bias: bool = False, dropout: float = 0.0, qk_norm: bool = True
    ) -> None:
        super().__init__()
        if dim % num_heads or (dim // num_heads) % 4:
            raise InputError(
                f"hidden size {dim} over {num_heads} heads gives head size {dim / num_heads}; "
                "2D rotary embedding needs a whole multiple of 4"
            )
        self.num_heads, self.dropout = num_heads, dropout
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.q_norm = RMSNorm(dim // num_heads) if qk_norm else None
        self.k_norm = RMSNorm(dim // num_heads) if qk_norm else None
        self.proj = nn.Linear(dim, dim)

    def forward(self, x_BLD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        if self.q_norm is None or self.qkv.bias is not None:
            out_BLD = self._with_bias_or_without_norm(x_BLD, cos, sin)
        else:
            norms = (self.q_norm.weight, self.k_norm.weight)
            out_BLD = attention_layer(
                x_BLD, self.qkv.weight, *norms, self.proj.weight, self.proj.bias, cos, sin, self.num_heads
            )
        return F.dropout(out_BLD, self.dropout, self.training) if self.dropout else out_BLD

    def _with_bias_or_without_norm(self, x_BLD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        qkv, H = self.qkv(x_BLD), self.num_heads
        if self.q_norm is None:
            q, k, v = rearrange(qkv, "B L (three H d) -> three B L H d", three=3, H=H)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        else:
            q, k, v = qk_norm_rope(qkv, self.q_norm.weight, self.k_norm.weight, cos, sin, H)
        return self.proj(rearrange(attention(q, k, v), "B L H d -> B L (H d)"))


def swiglu_width(dim: int, multiple: int = 1) -> int:
    """The hidden width that gives a SwiGLU the weights of an MLP of 4 D: 8 D / 3, rounded up to a multiple.

    Without one rounded down, as LightningDiT has it; LlamaGen rounds up to 256 (arXiv 2406.06525).
    """
    return -(-int(8 * dim / 3) // multiple) * multiple


class SwiGLU(nn.Module):
    """W2 (silu(W1 x) * W3 x) with W1 and W3 packed in one projection. [B, L, D] -> [B, L, D].

    dropout: in training, of what W2 reads. A hidden width of 8 D / 3 is rarely a multiple of 16, and a GPU multiplies
    matrices whose rows do not begin at multiples of 32 bytes at a third of its rate (2730 by 2736 on an H200). With
    our kernels the products therefore get columns of zeros, which change no number; the weights stay as they are.
    """

    MULTIPLE = 16
    stacked: ClassVar[dict[str, int]] = {"w13": 2}

    def __init__(self, dim: int, hidden: int, bias: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = dropout
        self.w13 = nn.Linear(dim, 2 * hidden, bias=bias)
        self.w2 = nn.Linear(hidden, dim, bias=bias)

    def forward(self, x_BLD: Tensor) -> Tensor:
        w13, b13, w2 = self.w13.weight, self.w13.bias, self.w2.weight
        if body(x_BLD) == "triton" and (gap := -w2.shape[1] % self.MULTIPLE):
            w13 = F.pad(w13.unflatten(0, (2, -1)), (0, 0, 0, gap)).flatten(0, 1)
            b13 = None if b13 is None else F.pad(b13.unflatten(0, (2, -1)), (0, gap)).flatten()
            w2 = F.pad(w2, (0, gap))
        if self.dropout and self.training:
            out_BLD = F.linear(F.dropout(swiglu(F.linear(x_BLD, w13, b13)), self.dropout), w2)
        elif b13 is None:
            out_BLD = swiglu_layer(x_BLD, w13, w2)
        else:
            out_BLD = swiglu_linear(F.linear(x_BLD, w13, b13), w2)
        return out_BLD if self.w2.bias is None else out_BLD + self.w2.bias


class ViTBlock(nn.Module):
    """The block of a plain vision transformer (arXiv 2010.11929), [B, L, D] -> [B, L, D], with biases and exact GELU.

    x <- x + proj(attention(LN(x)));  x <- x + fc2(GELU(fc1(LN(x))))
    dropout: in training, of the shares of attention and of what proj, fc1 and fc2 give.

    The keys' bias adds the same to all scores of a query and cancels in the softmax. Its gradient would be nothing but
    rounding, which AdamW scales up to steps, so it gets none.
    """

    stacked: ClassVar[dict[str, int]] = {"qkv": 3}

    def __init__(self, dim: int, num_heads: int, hidden: int, eps: float, dropout: float = 0.0) -> None:
        super().__init__()
        if dim % num_heads:
            raise InputError(f"hidden size {dim} does not divide over {num_heads} heads")
        self.num_heads, self.dropout = num_heads, dropout
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x_BLD: Tensor, seen_BL: Tensor | None = None) -> Tensor:
        """seen: bool [B, L], the tokens that the others may read; None: all."""
        of_q, of_k, of_v = self.qkv.bias.chunk(3)
        qkv = F.linear(self.norm1(x_BLD), self.qkv.weight, torch.cat([of_q, of_k.detach(), of_v]))
        x_BLD = x_BLD + self.drop(self.proj(self.attend(qkv, seen_BL)))
        return x_BLD + self.drop(self.fc2(self.drop(F.gelu(self.fc1(self.norm2(x_BLD))))))

    def attend(self, qkv: Tensor, seen_BL: Tensor | None) -> Tensor:
        q, k, v = rearrange(qkv, "B L (n H d) -> n B L H d", n=3, H=self.num_heads)
        dropout = self.dropout if self.training else 0.0
        if seen_BL is None and not dropout:
            return rearrange(attention(q, k, v), "B L H d -> B L (H d)")
        q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
        mask = None if seen_BL is None else seen_BL[:, None, None]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        return rearrange(out, "B H L d -> B L (H d)")

    def drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x


class TimestepEmbedder(nn.Module):
    """Sinusoid of t in [0, 1], then Linear, SiLU, Linear. t [B] -> [B, D]."""

    FREQUENCIES = 256

    def __init__(self, dim: int, max_period: float) -> None:
        super().__init__()
        self.max_period = max_period
        self.mlp = nn.Sequential(nn.Linear(self.FREQUENCIES, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t_B: Tensor) -> Tensor:
        embedding = timestep_embedding(t_B, self.FREQUENCIES, self.max_period)
        return self.mlp(embedding.to(self.mlp[0].weight.dtype))


class FourierEmbedder(Float32Tables):
    """[sin, cos] of 2 pi t times frequencies that were drawn once, then Linear, SiLU, Linear. t [B] -> [B, D].

    The frequencies are standard normal, not trained, and belong to the weights (arXiv 2006.10739).
    """

    FREQUENCIES = 256

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.randn(self.FREQUENCIES))
        self.mlp = nn.Sequential(nn.Linear(2 * self.FREQUENCIES, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t_B: Tensor) -> Tensor:
        angle = 2 * math.pi * t_B[:, None].to(torch.promote_types(t_B.dtype, torch.float32)) * self.frequencies
        return self.mlp(torch.cat([angle.sin(), angle.cos()], dim=-1).to(self.mlp[0].weight.dtype))


def timestep_embedding(t_B: Tensor, dim: int, max_period: float) -> Tensor:
    """[cos(t f_i), sin(t f_i)] with f_i = max_period^(-2 i / dim); float32 [B, dim]."""
    exponent = torch.arange(dim // 2, dtype=torch.float32, device=t_B.device) / (dim // 2)
    angle = t_B.float()[:, None] * torch.exp(-math.log(max_period) * exponent)
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def rope_2d(height: int, width: int, head_dim: int, extent: float = 16.0, theta: float = 1e4) -> tuple[Tensor, Tensor]:
    """Rotary tables of a height x width grid: (cos, sin), float32 [height width, head_dim / 2].

    Positions are linspace(0, extent, n) on each axis whatever n is. Frequencies are theta^(-k / head_dim) for
    k = 0, 4, 8, ...; the pairs interleave column and row: x0, y0, x1, y1, ...
    """
    frequencies = theta ** (-torch.arange(0, head_dim, 4, dtype=torch.float32) / head_dim)
    rows, columns = torch.meshgrid(torch.linspace(0, extent, height), torch.linspace(0, extent, width), indexing="ij")
    angles = torch.stack([columns.reshape(-1, 1) * frequencies, rows.reshape(-1, 1) * frequencies], dim=-1).flatten(1)
    return angles.cos(), angles.sin()


def rope_2d_axial(height: int, width: int, head_dim: int, theta: float = 1e4, first: int = 0) -> tuple[Tensor, Tensor]:
    """Rotary tables of a height x width grid at whole positions: (cos, sin), float32 [height width, head_dim / 2].

    The first half of the pairs turns with the row, the last with the column, both with theta^(-4 k / head_dim).
    first: position of the first row and column.
    """
    frequencies = theta ** (-torch.arange(0, head_dim, 4, dtype=torch.float32) / head_dim)
    rows, columns = torch.meshgrid(*(first + torch.arange(float(n)) for n in (height, width)), indexing="ij")
    angles = torch.cat([rows.reshape(-1, 1) * frequencies, columns.reshape(-1, 1) * frequencies], dim=-1)
    return angles.cos(), angles.sin()


def sincos_2d(height: int, width: int, dim: int, theta: float = 1e4) -> Tensor:
    """Fixed position embedding, float32 [height, width, dim]: the first half encodes the column, the last the row."""
    if dim % 4:
        raise ValueError(f"a 2D sine-cosine embedding needs a width divisible by 4, got {dim}")
    omega = theta ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))

    def axis(n: int) -> Tensor:
        angle = torch.arange(n, dtype=torch.float64)[:, None] * omega
        return torch.cat([angle.sin(), angle.cos()], dim=-1)

    column = axis(width)[None].expand(height, width, dim // 2)
    row = axis(height)[:, None].expand(height, width, dim // 2)
    return torch.cat([column, row], dim=-1).float()


def patchify(image: Tensor, patch: int) -> Tensor:
    """Images [B, C, S, S] as pixels of patches [B, L, P, C], patches and their pixels row by row."""
    return rearrange(image, "B C (h p) (w q) -> B (h w) (p q) C", p=patch, q=patch)


def unpatchify(pixels: Tensor, grid: int, patch: int) -> Tensor:
    """Pixels of patches, B L P 3 numbers in the order of `patchify` and of any shape, as images [B, 3, S, S]."""
    flat = pixels.reshape(-1, grid, grid, patch, patch, 3)
    return rearrange(flat, "B h w p q C -> B C (h p) (w q)")


def zero_(linears: Iterable[nn.Linear]) -> None:
    """Set weights and biases to 0."""
    for linear in linears:
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)


def small_(*weights: Tensor) -> None:
    """Draw weights from a normal of deviation 0.02, in their order."""
    for weight in weights:
        nn.init.normal_(weight, std=0.02)


def xavier_(module: nn.Module) -> None:
    """Xavier weights and zero biases for every linear layer of a module, in its order."""
    for linear in module.modules():
        if isinstance(linear, nn.Linear):
            nn.init.xavier_uniform_(linear.weight)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
