"""RAEv2's generator: DiT-DH with time and class as tokens of the encoder, and a weaker prediction to be guided by
(arXiv 2605.18324).

    tokens = [Linear(z), embed(1 - t) + time tokens, embed(y) + class tokens]     the last K of them are not rotated
    tokens = encoder blocks (tokens), without a condition;  s, s_b: the latents' tokens after the last block and block b
    output = head (z, SiLU(embed(1 - t) + s))                                     as in DiT-DH (ditdh.py), with QK-norm
    base   = Linear(RMSNorm(c) (1 + scale) + shift),  shift, scale = Linear(SiLU(c)),  c = SiLU(embed(1 - t) + s_b)

Both predict x (objective.predict) and learn by the same loss; drawing follows base + w (output - base).
Shapes: B batch, C x n x n latents, L = n n, D encoder width, K = time and class tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from pixelgen_fast.errors import InputError
from pixelgen_fast.layers import FourierEmbedder, rope_2d_axial, small_, zero_
from pixelgen_fast.models import ditdh
from pixelgen_fast.models.blocks import TokenHead, TokenStream, TransformerBlock, flatten, one_by_one
from pixelgen_fast.models.ditdh import WideHead, enter_
from pixelgen_fast.models.latent import LatentSystem
from pixelgen_fast.models.matrices import Matrices, all_matrices
from pixelgen_fast.models.system import depth_setting, width_setting

# a prediction, or it and the weaker one; where tokens are tapped, a pair of that and the tokens
Answer = Tensor | tuple[Tensor | tuple[Tensor, Tensor], Tensor]


@dataclass
class Settings(ditdh.Settings):
    """Size of a RAEv2 generator. The defaults are XL."""

    system: str = "raev2"
    hidden_size: int = 1440
    num_heads: int = 20
    latent_channels: int = width_setting(1024)
    time_tokens: int = width_setting(4)
    class_tokens: int = width_setting(8)
    # the encoder block, counted from 1, that the weaker prediction is made of
    base_depth: int = depth_setting(8)


class RAEv2(LatentSystem):
    """The System of this module; forward(..., both=True) gives the pair (prediction, weaker one) as the prediction."""

    guides_itself: ClassVar[bool] = True

    def __init__(self, settings: Settings, image_size: int, num_classes: int) -> None:
        super().__init__(settings, image_size, num_classes, tap_depth=settings.depth)
        D, C = settings.hidden_size, settings.latent_channels
        if not 1 <= settings.base_depth <= settings.depth:
            raise InputError(
                f"model.base_depth {settings.base_depth} is not one of the blocks 1 to {settings.depth}; change it or "
                "model.depth"
            )
        self.base_depth = settings.base_depth
        self.enter = nn.Linear(C, D)
        self.t_embed = FourierEmbedder(D)
        self.y_embed = nn.Embedding(num_classes + 1, D)
        self.time_tokens = nn.Parameter(torch.empty(settings.time_tokens, D))
        self.class_tokens = nn.Parameter(torch.empty(settings.class_tokens, D))
        self.encoder_blocks = nn.ModuleList(
            TransformerBlock(D, settings.num_heads, bias=True, modulated=False) for _ in range(settings.depth)
        )
        self.base = TokenHead(D, C)
        self.head = WideHead(settings, self.grid, qk_norm=True)

        cos, sin = rope_2d_axial(self.grid, self.grid, self.head_dim)
        K = settings.time_tokens + settings.class_tokens
        self.register_buffer("rope_cos", F.pad(cos, (0, 0, 0, K), value=1.0), persistent=False)
        self.register_buffer("rope_sin", F.pad(sin, (0, 0, 0, K)), persistent=False)
        self.initialise()

    def initialise(self) -> None:
        """Zero modulation and outputs, so that the first predictions are 0."""
        enter_(self.enter, self.head.enter)
        small_(self.y_embed.weight, self.t_embed.mlp[0].weight, self.t_embed.mlp[2].weight)
        small_(self.time_tokens, self.class_tokens)
        zero_([self.base.modulation, self.base.linear, *self.head.modulations()])

    def forward(self, z: Tensor, t: Tensor, y: Tensor, tap: int | None = None, both: bool = False) -> Answer:
        self.check_latents(z)
        self.check_tap(tap)
        x_BLC, t_B1D = rearrange(z, "B C h w -> B (h w) C"), self.t_embed(1 - t)[:, None]
        L, tapped, base = x_BLC.shape[1], None, None
        tokens = [self.enter(x_BLC), t_B1D + self.time_tokens, self.y_embed(y)[:, None] + self.class_tokens]
        stream = TokenStream(torch.cat(tokens, dim=1))
        for number, block in enumerate(self.encoder_blocks, start=1):
            stream = TokenStream(*block(*stream, None, self.rope_cos, self.rope_sin))
            if number == tap:
                tapped = stream.settle()[:, :L]
            if number == self.base_depth and both:
                base = self.weaker(F.silu(t_B1D + stream.settle()[:, :L]))
        prediction = self.as_latents(self.head(x_BLC, F.silu(t_B1D + stream.settle()[:, :L])))
        if both:
            prediction = prediction, base
        return prediction if tap is None else (prediction, tapped)

    def weaker(self, c_BLD: Tensor) -> Tensor:
        """The prediction of the block whose conditions these are."""
        return self.as_latents(self.base(*one_by_one(c_BLD), flatten(F.silu(c_BLD))))

    def as_latents(self, out: Tensor) -> Tensor:
        """B L C numbers as [B, C, n, n]."""
        return rearrange(out.reshape(-1, self.grid, self.grid, self.latent_channels), "B h w C -> B C h w")

    def trial(self, batch: int) -> Tensor:
        like = next(self.parameters())
        z = torch.empty(batch, *self.sample_shape, device=like.device, dtype=like.dtype)
        t, y = torch.zeros(batch, device=like.device), torch.zeros(batch, dtype=torch.int64, device=like.device)
        return torch.stack(self(z, t, y, both=True))

    def blocks(self) -> list[nn.Module]:
        return [*self.encoder_blocks, *self.head.blocks]

    def matrices(self) -> Matrices:
        """All, as published: "Muon on parameters of two dimensions"."""
        return all_matrices(self)

    def whole_modules(self) -> list[nn.Module]:
        return [*self.blocks(), self.head.out, self.base]


def build(settings: Settings, image_size: int, num_classes: int) -> RAEv2:
    """The model of a configuration, with fresh weights."""
    return RAEv2(settings, image_size, num_classes)
