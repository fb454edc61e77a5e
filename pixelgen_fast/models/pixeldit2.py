"""PixelDiT2: a patch transformer that predicts x, told by a frozen DINO what it sees in the noise (arXiv 2609.24919).

    g      = P_g(DINO(z), t),  P_g = Linear, one block modulated by SiLU(embed'(t)), Linear
    c      = SiLU(g + embed(t) + embed(y)),  where grounding is dropped SiLU(embed(t) + embed(y))     for each patch
    s      = blocks(patch_projection(z), c);  from block `context_start` on, K class tokens embed(y) + position stand
             before the patches, without rotation; their condition is the mean of c over the patches
    output = Linear(RMSNorm(s) (1 + scale) + shift),  shift, scale = Linear(SiLU(c))                  p p 3 numbers

A block is PixelDiT's with modulation Linear(SiLU(c)) of every token.
Shapes: B batch, L patches, K class tokens, T = B L or B (K + L) tokens, D width, F = p p 3.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixelgen_fast.dino.network import load_dino
from pixelgen_fast.dino.noisy import NoisyDino
from pixelgen_fast.errors import InputError
from pixelgen_fast.layers import PatchEmbed, TimestepEmbedder, rope_2d, small_, unpatchify, xavier_, zero_
from pixelgen_fast.models import system
from pixelgen_fast.models.blocks import (
    TokenBlock,
    TokenHead,
    TokenStream,
    TransformerBlock,
    by_image,
    flatten,
    one_by_one,
)
from pixelgen_fast.models.built_on import DINO, BuiltOn
from pixelgen_fast.models.system import System, depth_setting
from pixelgen_fast.settings import at_least, within

KEYS = ("model.dino", "model.weights")
MAX_PERIOD = 10.0


@dataclass
class Settings(system.Settings):
    """Size of a PixelDiT2. The defaults are H/16; L is 1024 x 24 with 16 heads, B 768 x 12 with 12 and context at 4."""

    built_on: ClassVar[tuple[BuiltOn, ...]] = (DINO,)

    system: str = "pixeldit2"
    hidden_size: int = 1280
    num_heads: int = 16
    depth: int = depth_setting(32)
    patch_size: int = 16
    # class tokens in front of the patches, and the block, counted from 0, that sees them first
    context_length: int = at_least(0, default=32, most=65_536)
    context_start: int = depth_setting(8, least=0)
    # of attention and feed-forward layers in the middle half of the blocks
    dropout: float = within(0, 1, open_high=True, default=0.2)
    # how often training hides the DINO from an image
    grounding_drop: float = within(0, 1, default=0.1)
    # a DINOv2 or DINOv3 of timm; it is never trained. A run keeps a copy beside its checkpoints, and so does an export
    dino: str = "vit_small_patch16_dinov3_qkvb.lvd1689m"
    # a file in timm's, Meta's or Hugging Face's names, a folder that holds a teacher, or "random"; null: from the hub
    weights: str | None = None


class Grounding(nn.Module):
    """P_g: the DINO's tokens [B, L, D'] and t [B] to a part of the condition [B, L, D]."""

    def __init__(self, features: int, dim: int, num_heads: int) -> None:
        super().__init__()
        self.t_embed = TimestepEmbedder(dim, MAX_PERIOD)
        self.enter = nn.Linear(features, dim)
        self.block = TransformerBlock(dim, num_heads)
        self.leave = nn.Linear(dim, dim)

    def forward(self, features: Tensor, t: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        stream = self.block(self.enter(features), None, None, F.silu(self.t_embed(t)), cos, sin)
        return self.leave(TokenStream(*stream).settle())


class PixelDiT2(System):
    """The System of this module; forward takes `ground`, bool [B]: which images the DINO's features reach.

    Without it all of them in training; in evaluation those that have a class, so that guidance leads away from an image
    without class and without grounding.

    The DINO is kept out of the children: neither trained, sharded nor saved, it moves and is cast with the model.
    """

    def __init__(self, settings: Settings, image_size: int, num_classes: int) -> None:
        super().__init__(settings, image_size, num_classes, tap_depth=settings.depth)
        p, D = settings.patch_size, settings.hidden_size
        if not 0 <= settings.context_start < settings.depth:
            raise InputError(
                f"model.context_start {settings.context_start} is not one of the blocks 0 to {settings.depth - 1}; "
                "change it or model.depth"
            )
        for key in ("dropout", "grounding_drop"):
            if not 0 <= getattr(settings, key) < 1:
                raise InputError(f"model.{key} is {getattr(settings, key)}; it is a probability in [0, 1)")
        self.context_length, self.context_start = settings.context_length, settings.context_start
        self.grounding_drop, self.draws = settings.grounding_drop, settings.dropout > 0

        dino = NoisyDino(
            load_dino(settings.dino, settings.weights, KEYS), self.grid, tuning="frozen", time_token="masked"
        )
        self._dino = (dino.eval(),)  # a module that is an attribute would become a child
        self.grounding = Grounding(dino.width, D, settings.num_heads)
        self.patch_embed = PatchEmbed(p, D)
        self.t_embed = TimestepEmbedder(D, MAX_PERIOD)
        self.y_embed = nn.Embedding(num_classes + 1, D)
        self.context_position = nn.Parameter(torch.empty(settings.context_length, D))
        # dropout acts in blocks i with depth / 4 <= i < 3 depth / 4
        middle = range(-(-settings.depth // 4), -(-3 * settings.depth // 4))
        self.patch_blocks = nn.ModuleList(
            TokenBlock(D, settings.num_heads, dropout=settings.dropout if i in middle else 0.0)
            for i in range(settings.depth)
        )
        self.head = TokenHead(D, 3 * p * p)

        cos, sin = rope_2d(self.grid, self.grid, self.head_dim)
        none = torch.zeros(settings.context_length, cos.shape[1])
        self.register_buffer("rope_cos", torch.cat([none + 1, cos]), persistent=False)
        self.register_buffer("rope_sin", torch.cat([none, sin]), persistent=False)
        self.initialise()

    def initialise(self) -> None:
        """Xavier products, but zero modulation and head: the first output is 0 and the blocks start as the identity."""
        xavier_(self)
        for embed in (self.t_embed, self.grounding.t_embed):
            small_(embed.mlp[0].weight, embed.mlp[2].weight)
        small_(self.y_embed.weight, self.context_position)
        modulated = [*self.patch_blocks, self.grounding.block, self.head]
        zero_([self.head.linear, *(module.modulation for module in modulated)])

    def forward(
        self, z: Tensor, t: Tensor, y: Tensor, tap: int | None = None, ground: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        self.check_images(z)
        self.check_tap(tap)
        if ground is None:
            ground = torch.ones_like(y, dtype=torch.bool) if self.training else y != self.num_classes
        K, L, tapped = self.context_length, self.grid**2, None
        y_BD = self.y_embed(y)
        c_BLD = self.condition(z, t, y_BD, ground)
        of_patches = flatten(F.silu(c_BLD))
        c, cos, sin = of_patches, self.rope_cos[K:], self.rope_sin[K:]
        stream = one_by_one(self.patch_embed(z)[0])
        for number, block in enumerate(self.patch_blocks):
            if number == self.context_start:
                context = y_BD[:, None] + self.context_position
                stream = one_by_one(torch.cat([context, by_image(stream, L)], dim=1))
                mean = c_BLD.mean(dim=1, keepdim=True).expand(-1, K, -1)
                c, cos, sin = flatten(F.silu(torch.cat([mean, c_BLD], dim=1))), self.rope_cos, self.rope_sin
            stream = TokenStream(*block(*stream, c, cos, sin))
            if number + 1 == tap:
                tapped = by_image(stream, len(cos))[:, -L:]
        x_T1F = self.head(*one_by_one(by_image(stream, len(cos))[:, -L:]), of_patches)
        prediction = unpatchify(x_T1F, self.grid, self.patch_size)
        return prediction if tap is None else (prediction, tapped)

    def condition(self, z: Tensor, t: Tensor, y_BD: Tensor, ground: Tensor) -> Tensor:
        """The condition of each patch [B, L, D]."""
        K = self.context_length
        with torch.no_grad():
            features = self._dino[0](z, t)
        g_BLD = self.grounding(features.to(z.dtype), t, self.rope_cos[K:], self.rope_sin[K:])
        g_BLD = torch.where(ground[:, None, None], g_BLD, 0.0)
        return F.silu(g_BLD + (self.t_embed(t) + y_BD)[:, None])

    def blocks(self) -> list[nn.Module]:
        return [*self.patch_blocks, self.grounding.block]

    def whole_modules(self) -> list[nn.Module]:
        return [*self.blocks(), self.head]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        self._dino[0]._apply(fn, recurse)
        return super()._apply(fn, recurse)


def build(settings: Settings, image_size: int, num_classes: int) -> PixelDiT2:
    """The model of a configuration: fresh weights, beside the DINO's own."""
    return PixelDiT2(settings, image_size, num_classes)
