"""DiT-DH: a deep and narrow transformer that sees the noised latents, and a shallow and wide one that predicts
(RAE, arXiv 2510.11690; the head is DDT's, arXiv 2504.05741).

    c      = SiLU(embed(1 - t) + embed(y))
    s      = encoder blocks (Linear(z) + position, SiLU(c))                       L tokens of width D
    s      = Linear(SiLU(embed(1 - t) + s))                                       L conditions of width W
    h      = head blocks (Linear(z), SiLU(s)), a condition of every token         L tokens of width W
    output = Linear(RMSNorm(h) (1 + scale) + shift),  shift, scale = Linear(SiLU(s))        C numbers of every latent

The class and the time reach the head through s alone. The prediction is of v (objective.predict). The time is embedded
as the share of noise 1 - t, so that published weights, whose time that is, keep their frequencies.
Shapes: B batch, C x n x n latents, L = n n, T = B L, D encoder width, W head width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from pixelgen_fast.layers import Float32Tables, FourierEmbedder, rope_2d_axial, sincos_2d, small_, zero_
from pixelgen_fast.models import latent
from pixelgen_fast.models.blocks import TokenBlock, TokenHead, TokenStream, TransformerBlock, flatten, one_by_one
from pixelgen_fast.models.latent import LatentSystem
from pixelgen_fast.models.system import depth_setting, width_setting


@dataclass
class Settings(latent.Settings):
    """Size of a DiT-DH. The defaults are XL; L is 1024 x 24 with 16 heads, B 768 x 12 with 12, S 384 x 12 with 6."""

    system: str = "ditdh"
    hidden_size: int = 1152
    num_heads: int = 16
    depth: int = depth_setting(28)
    head_width: int = width_setting(2048)
    head_heads: int = width_setting(16)
    head_depth: int = depth_setting(2)


class WideHead(Float32Tables):
    """The head: latents [B, L, C] and what the encoder saw, SiLU(embed(1 - t) + s) [B, L, D] -> [B, L, C]."""

    def __init__(self, settings: Settings, grid: int, qk_norm: bool) -> None:
        super().__init__()
        D, W, C = settings.hidden_size, settings.head_width, settings.latent_channels
        self.enter = nn.Linear(C, W)
        self.condition = nn.Linear(D, W) if D != W else nn.Identity()
        self.blocks = nn.ModuleList(
            TokenBlock(W, settings.head_heads, bias=True, qk_norm=qk_norm) for _ in range(settings.head_depth)
        )
        self.out = TokenHead(W, C)
        cos, sin = rope_2d_axial(grid, grid, W // settings.head_heads)
        self.register_buffer("rope_cos", cos, persistent=False)
        self.register_buffer("rope_sin", sin, persistent=False)

    def forward(self, x_BLC: Tensor, s_BLD: Tensor) -> Tensor:
        c_TW = flatten(F.silu(self.condition(s_BLD)))
        stream = one_by_one(self.enter(x_BLC))
        for block in self.blocks:
            stream = TokenStream(*block(*stream, c_TW, self.rope_cos, self.rope_sin))
        return self.out(*stream, c_TW).view_as(x_BLC)

    def modulations(self) -> list[nn.Linear]:
        """The layers that start at zero, with the last one."""
        return [*(block.modulation for block in self.blocks), self.out.modulation, self.out.linear]


class DiTDH(LatentSystem):
    """The System of this module."""

    def __init__(self, settings: Settings, image_size: int, num_classes: int) -> None:
        super().__init__(settings, image_size, num_classes, tap_depth=settings.depth)
        D, C = settings.hidden_size, settings.latent_channels
        self.enter = nn.Linear(C, D)
        self.t_embed = FourierEmbedder(D)
        self.y_embed = nn.Embedding(num_classes + 1, D)
        self.encoder_blocks = nn.ModuleList(
            TransformerBlock(D, settings.num_heads, bias=True, qk_norm=False) for _ in range(settings.depth)
        )
        self.head = WideHead(settings, self.grid, qk_norm=False)

        cos, sin = rope_2d_axial(self.grid, self.grid, self.head_dim)
        self.register_buffer("rope_cos", cos, persistent=False)
        self.register_buffer("rope_sin", sin, persistent=False)
        self.register_buffer("position", sincos_2d(self.grid, self.grid, D).flatten(0, 1), persistent=False)
        self.initialise()

    def initialise(self) -> None:
        """Zero modulation and output, so that the first output is 0 and blocks start as the identity."""
        enter_(self.enter, self.head.enter)
        small_(self.y_embed.weight, self.t_embed.mlp[0].weight, self.t_embed.mlp[2].weight)
        zero_([*(block.modulation for block in self.encoder_blocks), *self.head.modulations()])

    def forward(self, z: Tensor, t: Tensor, y: Tensor, tap: int | None = None) -> Tensor | tuple[Tensor, Tensor]:
        self.check_latents(z)
        self.check_tap(tap)
        x_BLC, t_BD = rearrange(z, "B C h w -> B (h w) C"), self.t_embed(1 - t)
        c_BD = F.silu(F.silu(t_BD + self.y_embed(y)))
        tokens, tapped = self.enter(x_BLC), None
        stream = TokenStream(tokens + self.position.to(tokens.dtype))
        for number, block in enumerate(self.encoder_blocks, start=1):
            stream = TokenStream(*block(*stream, c_BD, self.rope_cos, self.rope_sin))
            if number == tap:
                tapped = stream.settle()
        out_BLC = self.head(x_BLC, F.silu(t_BD[:, None] + stream.settle()))
        prediction = rearrange(out_BLC, "B (h w) C -> B C h w", h=self.grid)
        return prediction if tap is None else (prediction, tapped)

    def blocks(self) -> list[nn.Module]:
        return [*self.encoder_blocks, *self.head.blocks]

    def whole_modules(self) -> list[nn.Module]:
        return [*self.blocks(), self.head.out]


def enter_(*linears: nn.Linear) -> None:
    """Xavier weights and no biases, of the layers that latents enter by."""
    for linear in linears:
        nn.init.xavier_uniform_(linear.weight)
        nn.init.zeros_(linear.bias)


def build(settings: Settings, image_size: int, num_classes: int) -> DiTDH:
    """The model of a configuration, with fresh weights."""
    return DiTDH(settings, image_size, num_classes)
