"""The pixel decoder of RAE: a vision transformer from latent tokens to patches of pixels (arXiv 2510.11690).

    h     = [class token, Linear(z)] + positions       MAE's fixed table (arXiv 2111.06377), zeros for the class
    image = std Linear(LN(blocks(h))) + mean           p p 3 numbers of each patch: rows, columns, channels

The class token is dropped at the end. A latent of another grid than the table's is embedded and then resized to it,
bilinearly. LayerNorm's eps is 1e-12 throughout, as in MAE's code at Hugging Face.
Shapes: B batch, C latent channels, n x n latent tokens, N = n n, D width, p patch size, S = n p pixels a side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from pixelgen_fast.diffusion.path import widen
from pixelgen_fast.layers import Float32Tables, ViTBlock, sincos_2d, unpatchify, xavier_
from pixelgen_fast.settings import above, at_least

EPS = 1e-12


@dataclass
class DecoderSettings:
    """Size of a decoder. The defaults are the published XL's."""

    hidden_size: int = above(0, default=1152, most=65_536)
    depth: int = at_least(1, default=28, most=1000)
    num_heads: int = above(0, default=16, most=65_536)
    # width of the feed-forward layers
    ffn: int = above(0, default=4096, most=2**20)
    patch_size: int = above(0, default=16, most=65_536)


PUBLISHED: Mapping[str, Mapping[str, Any]] = {
    "B": dict(hidden_size=768, depth=12, num_heads=12, ffn=3072),
    "L": dict(hidden_size=1024, depth=24, num_heads=16, ffn=4096),
    "XL": dict(hidden_size=1152, depth=28, num_heads=16, ffn=4096),
}


class Decoder(Float32Tables):
    """forward(z [B, C, m, m]) -> images [B, 3, S, S] in float32 or wider, about [0, 1], not clipped.

    latent_dim: C. grid: n, of the position table. mean, std: of the three channels, as the encoder's input has them.
    Weights begin as MAE's: Xavier, biases and the class token at 0.
    Raises InputError for a width that does not divide over the heads, ValueError for one that is no multiple of 4.
    """

    def __init__(
        self,
        settings: DecoderSettings,
        latent_dim: int,
        grid: int,
        mean: Sequence[float] = (0.0, 0.0, 0.0),
        std: Sequence[float] = (1.0, 1.0, 1.0),
    ) -> None:
        super().__init__()
        D, p = settings.hidden_size, settings.patch_size
        self.settings, self.latent_dim, self.grid, self.patch_size = settings, latent_dim, grid, p
        self.embed = nn.Linear(latent_dim, D)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, D))
        self.blocks = nn.ModuleList(ViTBlock(D, settings.num_heads, settings.ffn, EPS) for _ in range(settings.depth))
        self.norm = nn.LayerNorm(D, eps=EPS)
        self.head = nn.Linear(D, p * p * 3)
        self.register_buffer("positions", position_table(grid, D), persistent=False)
        self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std)[:, None, None], persistent=False)
        xavier_(self)

    @property
    def image_size(self) -> int:
        """S."""
        return self.grid * self.patch_size

    def forward(self, z: Tensor) -> Tensor:
        return self.images(self.features(z))

    def trial(self, batch: int) -> Tensor:
        """A forward pass on `batch` empty latents, where the parameters are: to count FLOPs."""
        return self(self.embed.weight.new_zeros(batch, self.latent_dim, self.grid, self.grid))

    def features(self, z: Tensor) -> Tensor:
        """What the last layer reads: [B, N, D]."""
        h_BND = self.embed(rearrange(z, "B C h w -> B (h w) C").to(self.embed.weight.dtype))
        if z.shape[-2:] != (self.grid, self.grid):
            h = rearrange(h_BND, "B (h w) D -> B D h w", h=z.shape[-2])
            h = F.interpolate(h, size=(self.grid, self.grid), mode="bilinear", align_corners=False)
            h_BND = rearrange(h, "B D h w -> B (h w) D")
        h_BLD = torch.cat([self.cls_token.expand(len(z), -1, -1), h_BND], dim=1)
        h_BLD = h_BLD + self.positions.to(h_BLD.dtype)
        for block in self.blocks:
            h_BLD = block(h_BLD)
        return self.norm(h_BLD)[:, 1:]

    def images(self, features: Tensor) -> Tensor:
        """The last layer: features [B, N, D] -> images [B, 3, S, S]."""
        pixels = unpatchify(widen(self.head(features)), self.grid, self.patch_size)
        return pixels * self.std + self.mean


def position_table(grid: int, dim: int) -> Tensor:
    """MAE's table with a row of zeros for the class token in front: float32 [1, N + 1, D]."""
    table = sincos_2d(grid, grid, dim).reshape(1, grid * grid, dim)
    return torch.cat([table.new_zeros(1, 1, dim), table], dim=1)
