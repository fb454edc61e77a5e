"""DeCo: a patch transformer, and a decoder without attention for the pixels of each patch (arXiv 2511.19365).

    s      = patch blocks (patch_projection(z), SiLU(embed(t) + embed(y)))           L tokens of width D, as in PixelDiT
    y      = SiLU(Linear(SiLU(embed(t) + s)))                                        C channels for each pixel
    x      = Linear(Linear([pixel of z, cosines of its place in the patch]))
    x     += gate MLP(LN(x) (1 + scale) + shift), (shift, scale, gate) = Linear(y)   decoder_depth times
    output = Linear(LN(x))                                                           3 channels a pixel

Shapes: B batch, L patches, P pixels per patch, N = B L, D width, C decoder channels, F = 64 cosines.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from pixelgen_fast.errors import InputError
from pixelgen_fast.layers import PatchEmbed, TimestepEmbedder, rope_2d, small_, unpatchify, zero_
from pixelgen_fast.models import system
from pixelgen_fast.models.blocks import TransformerBlock
from pixelgen_fast.models.pixeldit import PatchTransformer
from pixelgen_fast.models.system import depth_setting, width_setting

FREQUENCIES = 8
EPS = 1e-6


@dataclass
class Settings(system.Settings):
    """Size of a DeCo. The defaults are XL/16."""

    system: str = "deco"
    hidden_size: int = 1152
    num_heads: int = 16
    patch_depth: int = depth_setting(28)
    patch_size: int = 16
    decoder_width: int = width_setting(32)
    decoder_depth: int = depth_setting(3)


def cosines_2d(size: int, count: int = FREQUENCIES) -> Tensor:
    """cos(pi f x) cos(pi g y) / (1 + f g) at the pixels of a patch, for f, g in linspace(0, count, count).

    float32 [size^2, count^2]: x the column and y the row, from 0 to 1; pixels row by row, g runs fastest. The
    frequencies are count / (count - 1) apart and not 1, as published weights want it.
    """
    place = torch.linspace(0, 1, size, dtype=torch.float64)
    frequency = torch.linspace(0, count, count, dtype=torch.float64)
    wave = torch.cos(torch.pi * place[:, None] * frequency)
    damping = 1 + frequency[:, None] * frequency
    return (torch.einsum("qf,pg->pqfg", wave, wave) / damping).reshape(size**2, count**2).float()


class PixelEmbed(nn.Linear):
    """Linear embedding of a pixel and of the F cosines of its place: [N, P, 3], [P, F] -> [N, P, C].

    The places are the same in every patch, so their part is computed once and not N times.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(3 + FREQUENCIES**2, channels)

    def forward(self, pixels_NP3: Tensor, place_PF: Tensor) -> Tensor:
        of_pixel, of_place = self.weight.split([3, FREQUENCIES**2], dim=1)
        return F.linear(pixels_NP3, of_pixel) + F.linear(place_PF.to(self.weight.dtype), of_place, self.bias)


class DecoderBlock(nn.Module):
    """Residual MLP on every pixel, modulated by the pixel's own condition y: [N, P, C], [N, P, C] -> [N, P, C]."""

    stacked: ClassVar[dict[str, int]] = {"modulation": 0}

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels, eps=EPS)
        self.modulation = nn.Linear(channels, 3 * channels)
        self.fc1 = nn.Linear(channels, channels)
        self.fc2 = nn.Linear(channels, channels)

    def forward(self, x_NPC: Tensor, y_NPC: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(y_NPC).chunk(3, dim=-1)
        h = torch.addcmul(shift, self.norm(x_NPC), 1 + scale)
        return torch.addcmul(x_NPC, gate, self.fc2(F.silu(self.fc1(h))))


class DeCo(PatchTransformer):
    """The System of this module."""

    def __init__(self, settings: Settings, image_size: int, num_classes: int) -> None:
        super().__init__(settings, image_size, num_classes, tap_depth=settings.patch_depth)
        p, D, C = settings.patch_size, settings.hidden_size, settings.decoder_width
        if min(settings.patch_depth, settings.decoder_depth) < 1:
            raise InputError(
                f"model.patch_depth {settings.patch_depth} and model.decoder_depth {settings.decoder_depth} "
                "must be at least 1"
            )
        self.patch_embed = PatchEmbed(p, D)
        self.pixel_embed = PixelEmbed(C)
        self.t_embed = TimestepEmbedder(D, max_period=10.0)
        self.y_embed = nn.Embedding(num_classes + 1, D)
        self.patch_blocks = nn.ModuleList(TransformerBlock(D, settings.num_heads) for _ in range(settings.patch_depth))
        self.condition = nn.Linear(D, p**2 * C)
        self.pixel_proj = nn.Linear(C, C)
        self.decoder_blocks = nn.ModuleList(DecoderBlock(C) for _ in range(settings.decoder_depth))
        self.head = nn.Sequential(nn.LayerNorm(C, eps=EPS, elementwise_affine=False), nn.Linear(C, 3))

        cos, sin = rope_2d(self.grid, self.grid, self.head_dim)
        self.register_buffer("rope_cos", cos, persistent=False)
        self.register_buffer("rope_sin", sin, persistent=False)
        self.register_buffer("pixel_place", cosines_2d(p), persistent=False)
        self.initialise()

    def initialise(self) -> None:
        """Zero head and decoder modulation, so that the first output is 0; unlike PixelDiT's, the patch blocks act."""
        nn.init.xavier_uniform_(self.patch_embed.weight)
        nn.init.zeros_(self.patch_embed.bias)
        small_(self.y_embed.weight, self.t_embed.mlp[0].weight, self.t_embed.mlp[2].weight)
        zero_([self.head[1], *(block.modulation for block in self.decoder_blocks)])

    def forward(self, z: Tensor, t: Tensor, y: Tensor, tap: int | None = None) -> Tensor | tuple[Tensor, Tensor]:
        self.check_images(z)
        self.check_tap(tap)
        t_BD = self.t_embed(t)
        tokens, pixels = self.patch_embed(z)
        s_BLD, tapped = self.patch_stage(tokens, F.silu(t_BD + self.y_embed(y)), tap)
        pixels_NP3 = self.decode_pixels(pixels, F.silu(t_BD[:, None] + s_BLD))
        prediction = unpatchify(pixels_NP3, self.grid, self.patch_size)
        return prediction if tap is None else (prediction, tapped)

    def blocks(self) -> list[nn.Module]:
        return [*self.patch_blocks, *self.decoder_blocks]

    def whole_modules(self) -> list[nn.Module]:
        return [*self.patch_blocks]

    def decode_pixels(self, pixels_BLP3: Tensor, s_BLD: Tensor) -> Tensor:
        """Noised pixels and the condition of their patch through the decoder: [B L, P, 3]."""
        y_NPC = rearrange(F.silu(self.condition(s_BLD)), "B L (P C) -> (B L) P C", P=self.patch_size**2)
        x_NPC = self.pixel_proj(self.pixel_embed(pixels_BLP3.flatten(0, 1), self.pixel_place))
        for block in self.decoder_blocks:
            x_NPC = block(x_NPC, y_NPC)
        return self.head(x_NPC)


def build(settings: Settings, image_size: int, num_classes: int) -> DeCo:
    """The model of a configuration, with fresh weights."""
    return DeCo(settings, image_size, num_classes)
