"""PixelDiT (arXiv 2511.20645) and JiT (arXiv 2511.13720) in plain PyTorch, as diffusers loads them.

forward(z [B, 3, S, S], t [B] in [0, 1], y int64 [B]) -> [B, 3, S, S], what `predict` of the pipeline says; t = 0 is
noise, t = 1 data, y = num_classes no class. This file needs torch and diffusers, nothing else.
Shapes: B batch, L patches, P pixels per patch, N = B L, D width, C pixel channels, H heads, K tokens without a place.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

EPS = 1e-6


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, in float32 or wider."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        return F.rms_norm(x.to(wide), self.weight.shape, self.weight.to(wide), EPS)


class TimestepEmbedder(nn.Module):
    """[cos(t f), sin(t f)] with f_i = max_period^(-i / 128), then Linear, SiLU, Linear. t [B] -> [B, D]."""

    def __init__(self, dim: int, max_period: float) -> None:
        super().__init__()
        self.max_period = max_period
        self.mlp = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t_B: Tensor) -> Tensor:
        exponent = torch.arange(128, dtype=torch.float32, device=t_B.device) / 128
        angle = t_B.float()[:, None] * torch.exp(-math.log(self.max_period) * exponent)
        return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=-1).to(self.mlp[0].weight.dtype))


class Attention(nn.Module):
    """Self-attention with normed and rotated queries and keys. [B, L, D] -> [B, L, D]; cos, sin [L, D / H / 2]."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = False) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.q_norm = RMSNorm(dim // num_heads)
        self.k_norm = RMSNorm(dim // num_heads)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x_BLD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = self.qkv(x_BLD).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = (rotate(norm(x), cos, sin).to(v.dtype) for norm, x in ((self.q_norm, q), (self.k_norm, k)))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """W2 (silu(W1 x) * W3 x); W1 and W3 are one weight."""

    def __init__(self, dim: int, bias: bool) -> None:
        super().__init__()
        hidden = int(8 * dim / 3)
        self.w13 = nn.Linear(dim, 2 * hidden, bias=bias)
        self.w2 = nn.Linear(hidden, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.w13(x).chunk(2, dim=-1)
        return self.w2(F.silu(a) * b)


class TransformerBlock(nn.Module):
    """AdaLN with six modulations of the condition c [B, D], attention, SwiGLU. [B, L, D] -> [B, L, D]."""

    def __init__(self, dim: int, num_heads: int, bias: bool) -> None:
        super().__init__()
        self.norm1 = RMSNorm(dim)
        self.attn = Attention(dim, num_heads, qkv_bias=bias)
        self.norm2 = RMSNorm(dim)
        self.mlp = SwiGLU(dim, bias)
        self.modulation = nn.Linear(dim, 6 * dim)

    def forward(self, x: Tensor, c_BD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c_BD)[:, None].chunk(6, dim=-1)
        h = (self.norm1(x) * (1 + scale1) + shift1).to(x.dtype)
        x = x + gate1 * self.attn(h, cos, sin)
        h = (self.norm2(x) * (1 + scale2) + shift2).to(x.dtype)
        return x + gate2 * self.mlp(h)


class PixelBlock(nn.Module):
    """Attention over compacted patch tokens, then an MLP on every pixel, by the patch condition s [N, D].

    [N, P, C] -> [N, P, C]. post: four modulations on the outputs of the branches instead of six with gates.
    """

    def __init__(self, dim: int, num_heads: int, pixels: int, channels: int, mlp_ratio: int, post: bool, gelu: str):
        super().__init__()
        self.post, self.gelu = post, gelu
        self.norm1 = RMSNorm(channels)
        self.modulation_attn = None if post else nn.Linear(dim, pixels * 2 * channels)
        self.compress = nn.Linear(pixels * channels, dim)
        self.attn = Attention(dim, num_heads)
        self.expand = nn.Linear(dim, pixels * channels)
        self.norm2 = RMSNorm(channels)
        self.modulation_mlp = nn.Linear(dim, pixels * 4 * channels)
        self.fc1 = nn.Linear(channels, mlp_ratio * channels)
        self.fc2 = nn.Linear(mlp_ratio * channels, channels)

    def forward(self, x_NPC: Tensor, s_ND: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        N, P, C = x_NPC.shape
        wide = torch.promote_types(x_NPC.dtype, torch.float32)
        h = self.norm1(x_NPC)
        if not self.post:
            shift, scale = self.modulation_attn(s_ND).view(N, P, 2 * C).to(wide).chunk(2, dim=-1)
            h = h * (1 + scale) + shift
        tokens = h.to(x_NPC.dtype).reshape(-1, len(cos), P * C).to(self.compress.weight.dtype)
        e_NPC = self.expand(self.attn(self.compress(tokens), cos, sin)).view(N, P, C)
        a, b, c, d = self.modulation_mlp(s_ND).view(N, P, 4 * C).to(wide).chunk(4, dim=-1)
        if self.post:
            m = x_NPC.to(wide) + (1 + a) * e_NPC + b
            y = m + (1 + c) * self.mlp(self.norm2(m)) + d
        else:
            m = x_NPC.to(wide) + a * e_NPC
            y = m + d * self.mlp(self.norm2(m) * (1 + c) + b)
        return y.to(x_NPC.dtype)

    def mlp(self, h: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(h.to(self.fc1.weight.dtype)), approximate=self.gelu))


class PixelHead(nn.Module):
    """RMSNorm over the channels of a pixel, then Linear to its 3 channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = RMSNorm(channels)
        self.linear = nn.Linear(channels, 3)

    def forward(self, x_NPC: Tensor) -> Tensor:
        return self.linear(self.norm(x_NPC).to(x_NPC.dtype).to(self.linear.weight.dtype))


class Registers(nn.Module):
    """K learned tokens before those of the patches: [B, L, D] -> [B, K + L, D]."""

    def __init__(self, count: int, dim: int) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.empty(count, dim))

    def forward(self, tokens_BLD: Tensor) -> Tensor:
        return torch.cat([self.tokens.expand(len(tokens_BLD), -1, -1), tokens_BLD], dim=1)


class PixelDiT(ModelMixin, ConfigMixin):
    """A patch transformer, and a head of pixel blocks that its tokens are the condition of."""

    @register_to_config
    def __init__(
        self,
        image_size: int,
        num_classes: int,
        hidden_size: int,
        num_heads: int,
        patch_depth: int,
        patch_size: int,
        pixel_hidden_size: int,
        pixel_depth: int,
        pixel_mlp_ratio: int = 4,
        post_modulation: bool = False,
        gelu_tanh: bool = False,
        pixel_stream_float32: bool = False,
        num_registers: int = 0,
    ) -> None:
        super().__init__()
        D, C, P = hidden_size, pixel_hidden_size, patch_size**2
        gelu = "tanh" if gelu_tanh else "none"
        self.patch_embed = nn.Linear(3 * P, D)
        self.registers = Registers(num_registers, D) if num_registers else None
        self.pixel_embed = nn.Linear(3, C)
        self.t_embed = TimestepEmbedder(D, max_period=10.0)
        self.y_embed = nn.Embedding(num_classes + 1, D)
        self.patch_blocks = nn.ModuleList(TransformerBlock(D, num_heads, bias=False) for _ in range(patch_depth))
        self.pixel_blocks = nn.ModuleList(
            PixelBlock(D, num_heads, P, C, pixel_mlp_ratio, post_modulation, gelu) for _ in range(pixel_depth)
        )
        self.head = PixelHead(C)

    def forward(self, z: Tensor, t: Tensor, y: Tensor) -> Tensor:
        c, p = self.config, self.config.patch_size
        n, K = c.image_size // p, c.num_registers
        cos, sin = rope_2d(n, c.hidden_size // c.num_heads, z.device)
        patches = patchify(z, p)
        t_BD = self.t_embed(t)
        x = self.patch_embed(patches)
        x = x if self.registers is None else self.registers(x)
        for block in self.patch_blocks:
            x = block(x, F.silu(t_BD + self.y_embed(y)), *without_place(cos, sin, K))
        s_ND = F.silu(t_BD[:, None] + x[:, K:]).flatten(0, 1)
        pixels = self.pixel_embed(patches.unflatten(-1, (3, -1)).transpose(-1, -2))
        position = sincos_2d(c.image_size, c.pixel_hidden_size, z.device)
        position = position.view(n, p, n, p, -1).transpose(1, 2).reshape(n * n, p * p, -1)
        pixels = pixels + (position if c.pixel_stream_float32 else position.to(pixels.dtype))
        x_NPC = pixels.flatten(0, 1)
        for block in self.pixel_blocks:
            x_NPC = block(x_NPC, s_ND, cos, sin)
        return unpatchify(self.head(x_NPC), n, p)


class BottleneckEmbed(nn.Module):
    """Two linear maps of a patch, the first to a narrow width."""

    def __init__(self, patch_size: int, bottleneck: int, dim: int) -> None:
        super().__init__()
        self.down = nn.Linear(3 * patch_size**2, bottleneck, bias=False)
        self.up = nn.Linear(bottleneck, dim)

    def forward(self, patches: Tensor) -> Tensor:
        return self.up(self.down(patches))


class TokenHead(nn.Module):
    """Modulated RMSNorm, then Linear to the pixels of a patch."""

    def __init__(self, patch_size: int, dim: int) -> None:
        super().__init__()
        self.norm = RMSNorm(dim)
        self.modulation = nn.Linear(dim, 2 * dim)
        self.linear = nn.Linear(dim, 3 * patch_size**2)

    def forward(self, x: Tensor, c_BD: Tensor) -> Tensor:
        shift, scale = self.modulation(c_BD)[:, None].chunk(2, dim=-1)
        return self.linear((self.norm(x) * (1 + scale) + shift).to(x.dtype))


class JiT(ModelMixin, ConfigMixin):
    """A plain transformer on large patches; K tokens of the class stand before them from a block on."""

    @register_to_config
    def __init__(
        self,
        image_size: int,
        num_classes: int,
        hidden_size: int,
        num_heads: int,
        depth: int,
        patch_size: int,
        bottleneck: int,
        context_length: int,
        context_start: int,
    ) -> None:
        super().__init__()
        D, K = hidden_size, context_length
        self.patch_embed = BottleneckEmbed(patch_size, bottleneck, D)
        self.t_embed = TimestepEmbedder(D, max_period=1e4)
        self.y_embed = nn.Embedding(num_classes + 1, D)
        self.context_position = nn.Parameter(torch.empty(K, D)) if K else None
        self.transformer = nn.ModuleList(TransformerBlock(D, num_heads, bias=True) for _ in range(depth))
        self.head = TokenHead(patch_size, D)

    def forward(self, z: Tensor, t: Tensor, y: Tensor) -> Tensor:
        c, K = self.config, 0
        n = c.image_size // c.patch_size
        cos, sin = rope_2d_axial(n, c.hidden_size // c.num_heads, z.device)
        y_BD = self.y_embed(y)
        c_BD = F.silu(self.t_embed(t) + y_BD)
        x = self.patch_embed(patchify(z, c.patch_size))
        x = x + sincos_2d(n, c.hidden_size, z.device).flatten(0, 1).to(x.dtype)
        for i, block in enumerate(self.transformer):
            if i == c.context_start and c.context_length:
                K = c.context_length
                x = torch.cat([y_BD[:, None] + self.context_position, x], dim=1)
            x = block(x, c_BD, *without_place(cos, sin, K))
        return unpatchify(self.head(x, c_BD)[:, K:], n, c.patch_size)


def patchify(z: Tensor, p: int) -> Tensor:
    """Images [B, 3, S, S] as patches [B, L, 3 P], channel by channel."""
    B, C, S, _ = z.shape
    return z.view(B, C, S // p, p, S // p, p).permute(0, 2, 4, 1, 3, 5).reshape(B, (S // p) ** 2, C * p * p)


def unpatchify(pixels: Tensor, n: int, p: int) -> Tensor:
    """Pixels of patches, 3 numbers each, pixel by pixel, as images [B, 3, S, S]."""
    return pixels.reshape(-1, n, n, p, p, 3).permute(0, 5, 1, 3, 2, 4).reshape(-1, 3, n * p, n * p)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs of neighbouring channels turned by their angles. x [B, H, L, d]."""
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)


def rope_2d(n: int, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(cos, sin) [n n, d / 2] at linspace(0, 16, n): of the column and of the row in turns, 10000^(-4 k / d)."""
    frequencies = 1e4 ** (-torch.arange(0, head_dim, 4, dtype=torch.float32) / head_dim)
    rows, columns = torch.meshgrid(torch.linspace(0, 16, n), torch.linspace(0, 16, n), indexing="ij")
    angles = torch.stack([columns.reshape(-1, 1) * frequencies, rows.reshape(-1, 1) * frequencies], dim=-1).flatten(1)
    return angles.cos().to(device), angles.sin().to(device)


def rope_2d_axial(n: int, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(cos, sin) [n n, d / 2] at whole positions: first of the row, then of the column, 10000^(-4 k / d)."""
    frequencies = 1e4 ** (-torch.arange(0, head_dim, 4, dtype=torch.float32) / head_dim)
    rows, columns = torch.meshgrid(torch.arange(float(n)), torch.arange(float(n)), indexing="ij")
    angles = torch.cat([rows.reshape(-1, 1) * frequencies, columns.reshape(-1, 1) * frequencies], dim=-1)
    return angles.cos().to(device), angles.sin().to(device)


def without_place(cos: Tensor, sin: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The tables with rows before them for tokens that are not turned."""
    return F.pad(cos, (0, 0, count, 0), value=1.0), F.pad(sin, (0, 0, count, 0))


def sincos_2d(n: int, dim: int, device: torch.device) -> Tensor:
    """Fixed positions, float32 [n, n, dim]: sines and cosines of the column, then of the row."""
    omega = 1e4 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angle = torch.arange(n, dtype=torch.float64)[:, None] * omega
    axis = torch.cat([angle.sin(), angle.cos()], dim=-1).float().to(device)
    column, row = axis[None].expand(n, n, dim // 2), axis[:, None].expand(n, n, dim // 2)
    return torch.cat([column, row], dim=-1)
