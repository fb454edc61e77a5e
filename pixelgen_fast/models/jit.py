"""JiT: a plain transformer on large patches of pixels that predicts the clean image (arXiv 2511.13720).

    c      = embed(t) + embed(y)
    tokens = Up(Down(patches of z)) + position                           through a bottleneck narrower than a patch
    tokens = blocks(tokens, SiLU(c)), from block `context_start` on behind K context tokens embed(y) + learned position
    output = Linear(modulated RMSNorm(patch tokens))                     3 channels of every pixel of a patch

The prediction is of x (objective.predict). Shapes: B batch, L patches, K context tokens, D width, H heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from pixelgen_kernels import norm_modulate
from torch import Tensor, nn

from pixelgen_fast.errors import InputError
from pixelgen_fast.layers import (
    RMSNorm,
    TimestepEmbedder,
    rope_2d_axial,
    sincos_2d,
    small_,
    unpatchify,
    xavier_,
    zero_,
)
from pixelgen_fast.models import system
from pixelgen_fast.models.blocks import TokenStream, TransformerBlock
from pixelgen_fast.models.system import System, depth_setting, width_setting
from pixelgen_fast.settings import at_least, within


@dataclass
class Settings(system.Settings):
    """Size of a JiT. The defaults are B/16."""

    system: str = "jit"
    hidden_size: int = 768
    num_heads: int = 12
    depth: int = depth_setting(12)
    patch_size: int = 16
    # width that a patch is squeezed to on its way in
    bottleneck: int = width_setting(128)
    # class tokens in front of the patches, and the block, counted from 0, that sees them first
    context_length: int = at_least(0, default=32, most=65_536)
    context_start: int = depth_setting(4, least=0)
    # of attention and feed-forward layers in the middle half of the blocks
    dropout: float = within(0, 1, open_high=True, default=0.0)


class BottleneckEmbed(nn.Module):
    """Two linear maps of p x p patches, the first to a narrow width. z [B, 3, S, S] -> tokens [B, L, D]."""

    def __init__(self, patch_size: int, bottleneck: int, dim: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.down = nn.Linear(3 * patch_size**2, bottleneck, bias=False)
        self.up = nn.Linear(bottleneck, dim)

    def forward(self, z: Tensor) -> Tensor:
        p = self.patch_size
        return self.up(self.down(rearrange(z, "B C (h p) (w q) -> B (h w) (C p q)", p=p, q=p)))


class Head(nn.Module):
    """Modulated RMSNorm, then Linear to the pixels of a patch. Stream of K + L tokens -> [B, L, 3 P]."""

    def __init__(self, patch_size: int, dim: int) -> None:
        super().__init__()
        self.norm = RMSNorm(dim)
        self.modulation = nn.Linear(dim, 2 * dim)
        self.linear = nn.Linear(dim, 3 * patch_size**2)

    def forward(self, x: Tensor, branch: Tensor, gate: Tensor, c_BD: Tensor, context: int) -> Tensor:
        shift, scale = self.modulation(c_BD).chunk(2, dim=-1)
        h, _ = norm_modulate(x, self.norm.weight, shift, scale, branch, gate)
        return self.linear(h[:, context:])


class JiT(System):
    """The System of this module."""

    def __init__(self, settings: Settings, image_size: int, num_classes: int) -> None:
        super().__init__(settings, image_size, num_classes, tap_depth=settings.depth)
        check(settings)
        p, D, K = settings.patch_size, settings.hidden_size, settings.context_length
        self.context_length, self.context_start = K, settings.context_start
        self.draws = settings.dropout > 0
        self.patch_embed = BottleneckEmbed(p, settings.bottleneck, D)
        self.t_embed = TimestepEmbedder(D, max_period=1e4)
        self.y_embed = nn.Embedding(num_classes + 1, D)
        self.context_position = nn.Parameter(torch.empty(K, D)) if K else None
        # dropout acts in blocks i with depth / 4 <= i < 3 depth / 4
        middle = range(settings.depth // 4, 3 * (settings.depth // 4))
        self.transformer = nn.ModuleList(
            TransformerBlock(D, settings.num_heads, bias=True, dropout=settings.dropout if i in middle else 0.0)
            for i in range(settings.depth)
        )
        self.head = Head(p, D)

        cos, sin = rope_2d_axial(self.grid, self.grid, self.head_dim)
        # context tokens stand nowhere: they are not turned
        cos, sin = F.pad(cos, (0, 0, K, 0), value=1.0), F.pad(sin, (0, 0, K, 0))
        self.register_buffer("rope_cos", cos, persistent=False)
        self.register_buffer("rope_sin", sin, persistent=False)
        self.register_buffer("position", sincos_2d(self.grid, self.grid, D).flatten(0, 1), persistent=False)
        self.initialise()

    def initialise(self) -> None:
        """Zero modulation and head, so that the first output is 0 and blocks start as the identity."""
        xavier_(self)
        small_(self.y_embed.weight, self.t_embed.mlp[0].weight, self.t_embed.mlp[2].weight)
        if self.context_position is not None:
            small_(self.context_position)
        zero_([self.head.linear, self.head.modulation, *(b.modulation for b in self.transformer)])

    def forward(self, z: Tensor, t: Tensor, y: Tensor, tap: int | None = None) -> Tensor | tuple[Tensor, Tensor]:
        self.check_images(z)
        self.check_tap(tap)
        y_BD = self.y_embed(y)
        c_BD = F.silu(self.t_embed(t) + y_BD)
        tokens = self.patch_embed(z)
        stream, context, tapped = TokenStream(tokens + self.position.to(tokens.dtype)), 0, None
        for i, block in enumerate(self.transformer):
            if i == self.context_start and self.context_length:
                context = self.context_length
                stream = TokenStream(torch.cat([y_BD[:, None] + self.context_position, stream.settle()], dim=1))
            first = self.context_length - context  # the tables begin with the rows of context tokens
            stream = TokenStream(*block(*stream, c_BD, self.rope_cos[first:], self.rope_sin[first:]))
            if i + 1 == tap:
                tapped = stream.settle()[:, context:]
        prediction = unpatchify(self.head(*stream, c_BD, context), self.grid, self.patch_size)
        return prediction if tap is None else (prediction, tapped)

    def blocks(self) -> list[nn.Module]:
        return [*self.transformer]

    def whole_modules(self) -> list[nn.Module]:
        return [*self.transformer, self.head]


def check(settings: Settings) -> None:
    """Raise InputError, naming the setting and its value, for what no JiT can be built from."""
    if min(settings.depth, settings.bottleneck) < 1:
        raise InputError(f"model.depth {settings.depth} and model.bottleneck {settings.bottleneck} must be at least 1")
    if settings.context_length < 0:
        raise InputError(f"model.context_length {settings.context_length} must not be negative; 0 is no context tokens")
    if settings.context_length and not 0 <= settings.context_start < settings.depth:
        raise InputError(
            f"model.context_start {settings.context_start} names no block; model.depth {settings.depth} has blocks 0 "
            f"to {settings.depth - 1}"
        )
    if not 0 <= settings.dropout < 1:
        raise InputError(f"model.dropout {settings.dropout} is a probability in [0, 1)")


def build(settings: Settings, image_size: int, num_classes: int) -> JiT:
    """The model of a configuration, with fresh weights."""
    return JiT(settings, image_size, num_classes)
