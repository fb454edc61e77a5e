"""PixelDiT2: a patch transformer that predicts x, told by a frozen DINO what it sees in the noise (arXiv 2609.24919).

    g      = P_g(DINO(z), t),  P_g = Linear, one block modulated by SiLU(embed'(t)), Linear
    c      = SiLU(g + embed(t) + embed(y)),  where grounding is dropped SiLU(embed(t) + embed(y))     for each patch
    s      = blocks(patch_projection(z), c);  from block `context_start` on, K class tokens embed(y) + position stand
             before the patches, without rotation; their condition is the mean of c over the patches
    output = Linear(RMSNorm(s) (1 + scale) + shift),  shift, scale = Linear(SiLU(c))                  p p 3 numbers

A block is PixelDiT's with modulation Linear(SiLU(c)) of every token. norm_modulate takes one modulation for an image,
so here a token is what an image is there: x [T, 1, D], modulation [T, D].
Shapes: B batch, L patches, K class tokens, T = B L or B (K + L) tokens, D width, F = p p 3.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from pixelgen_kernels import norm_modulate
from torch import Tensor, nn

from pixelgen_fast.models.dino import NoisyDino
from pixelgen_fast.models.layers import Float32Tables, PatchEmbed, RMSNorm, TimestepEmbedder, rope_2d
from pixelgen_fast.models.pixeldit import PatchBlock, TokenStream
from pixelgen_fast.models.teacher import load_dino

KEYS = ("model.dino", "model.weights")
MAX_PERIOD = 10.0


@dataclass
class Config:
    """Size of a PixelDiT2. The defaults are H/16; L is 1024 x 24 with 16 heads, B 768 x 12 with 12 and context at 4."""

    system: str = "pixeldit2"
    hidden_size: int = 1280
    num_heads: int = 16
    depth: int = 32
    patch_size: int = 16
    # class tokens in front of the patches, and the block, counted from 0, that sees them first
    context_length: int = 32
    context_start: int = 8
    # of attention and feed-forward layers in the middle half of the blocks
    dropout: float = 0.2
    # how often training hides the DINO from an image
    grounding_drop: float = 0.1
    # a DINOv2 or DINOv3 of timm; it is never trained. A run keeps a copy beside its checkpoints, and so does an export
    dino: str = "vit_small_patch16_dinov3_qkvb.lvd1689m"
    # a file in timm's or Meta's names, a folder that holds a teacher, or "random"; null: from the hub
    weights: str | None = None


class TokenBlock(PatchBlock):
    """PixelDiT's block, its modulation Linear(SiLU(c)) of each token; (x, branch, gate) in and out, x [T, 1, D]."""

    def __init__(self, dim: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__(dim, num_heads)
        self.attn.dropout = self.mlp.dropout = dropout

    def forward(
        self, x: Tensor, branch: Tensor | None, gate: Tensor | None, c_TD: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(F.silu(c_TD)).chunk(6, dim=-1)
        h, x = norm_modulate(x, self.norm1.weight, shift1, scale1, branch, gate)
        h = rearrange(h, "(B L) 1 D -> B L D", L=len(cos))
        h = rearrange(self.attn(h, cos, sin), "B L D -> (B L) 1 D")
        h, x = norm_modulate(x, self.norm2.weight, shift2, scale2, h, gate1)
        return x, self.mlp(h), gate2


class Grounding(nn.Module):
    """P_g: the DINO's tokens [B, L, D'] and t [B] to a part of the condition [B, L, D]."""

    def __init__(self, features: int, dim: int, num_heads: int) -> None:
        super().__init__()
        self.t_embed = TimestepEmbedder(dim, MAX_PERIOD)
        self.enter = nn.Linear(features, dim)
        self.block = PatchBlock(dim, num_heads)
        self.leave = nn.Linear(dim, dim)

    def forward(self, features: Tensor, t: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        stream = self.block(self.enter(features), None, None, F.silu(self.t_embed(t)), cos, sin)
        return self.leave(TokenStream(*stream).settle())


class Head(nn.Module):
    """RMSNorm, modulation of each token, Linear to its pixels: x [T, 1, D], c [T, D] -> [T, 1, F]."""

    def __init__(self, dim: int, pixels: int) -> None:
        super().__init__()
        self.norm = RMSNorm(dim)
        self.modulation = nn.Linear(dim, 2 * dim)
        self.linear = nn.Linear(dim, pixels)

    def forward(self, x: Tensor, c_TD: Tensor) -> Tensor:
        shift, scale = self.modulation(F.silu(c_TD)).chunk(2, dim=-1)
        return self.linear(norm_modulate(x, self.norm.weight, shift, scale)[0])


class PixelDiT2(Float32Tables):
    """forward(z [B, 3, S, S], t [B] in [0, 1], y int64 [B]) -> x [B, 3, S, S]; y = num_classes is the null class.

    With tap = k, from 1 to tap_depth, also the patch tokens after block k [B, L, D]. ground: bool [B], which images the
    DINO's features reach. Without it all of them in training; in evaluation those that have a class, so that guidance
    leads away from an image without class and without grounding. Raises ValueError for other images or another tap.

    The DINO is kept out of the children: neither trained, sharded nor saved, it moves and is cast with the model.
    """

    def __init__(self, config: Config, image_size: int, num_classes: int) -> None:
        super().__init__()
        p, D = config.patch_size, config.hidden_size
        if image_size % p:
            raise ValueError(f"data.image_size {image_size} does not divide into model.patch_size {p} patches")
        if not 0 <= config.context_start < config.depth:
            raise ValueError(
                f"model.context_start {config.context_start} is not one of the blocks 0 to {config.depth - 1}; change "
                "it or model.depth"
            )
        for key in ("dropout", "grounding_drop"):
            if not 0 <= getattr(config, key) < 1:
                raise ValueError(f"model.{key} is {getattr(config, key)}; it is a probability in [0, 1)")
        self.patch_size, self.grid = p, image_size // p
        self.image_size, self.num_classes = image_size, num_classes
        self.hidden_size, self.tap_depth = D, config.depth
        self.context_length, self.context_start = config.context_length, config.context_start
        self.grounding_drop, self.uses_randomness = config.grounding_drop, config.dropout > 0

        dino = NoisyDino(load_dino(config.dino, config.weights, KEYS), self.grid, tuning="frozen", time_token="masked")
        self._dino = (dino.eval(),)  # a module that is an attribute would become a child
        self.grounding = Grounding(dino.width, D, config.num_heads)
        self.patch_embed = PatchEmbed(p, D)
        self.t_embed = TimestepEmbedder(D, MAX_PERIOD)
        self.y_embed = nn.Embedding(num_classes + 1, D)
        self.context_position = nn.Parameter(torch.empty(config.context_length, D))
        # dropout acts in blocks i with depth / 4 <= i < 3 depth / 4
        middle = range(-(-config.depth // 4), -(-3 * config.depth // 4))
        self.patch_blocks = nn.ModuleList(
            TokenBlock(D, config.num_heads, config.dropout if i in middle else 0.0) for i in range(config.depth)
        )
        self.head = Head(D, 3 * p * p)

        cos, sin = rope_2d(self.grid, self.grid, D // config.num_heads)
        none = torch.zeros(config.context_length, cos.shape[1])
        self.register_buffer("rope_cos", torch.cat([none + 1, cos]), persistent=False)
        self.register_buffer("rope_sin", torch.cat([none, sin]), persistent=False)
        self.initialise()

    def initialise(self) -> None:
        """Xavier products, but zero modulation and head: the first output is 0 and the blocks start as the identity."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for embed in (self.t_embed, self.grounding.t_embed):
            nn.init.normal_(embed.mlp[0].weight, std=0.02)
            nn.init.normal_(embed.mlp[2].weight, std=0.02)
        for weight in (self.y_embed.weight, self.context_position):
            nn.init.normal_(weight, std=0.02)
        modulated = [*self.patch_blocks, self.grounding.block, self.head]
        for linear in [self.head.linear, *(module.modulation for module in modulated)]:
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(
        self, z: Tensor, t: Tensor, y: Tensor, tap: int | None = None, ground: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        if z.shape[1:] != (3, self.image_size, self.image_size):
            raise ValueError(
                f"PixelDiT2 was built for images [B, 3, {self.image_size}, {self.image_size}], got {list(z.shape)}"
            )
        if tap is not None and not 1 <= tap <= self.tap_depth:
            raise ValueError(f"tap {tap}: this PixelDiT2 has blocks 1 to {self.tap_depth}")
        if ground is None:
            ground = torch.ones_like(y, dtype=torch.bool) if self.training else y != self.num_classes
        K, L, tapped = self.context_length, self.grid**2, None
        y_BD = self.y_embed(y)
        c_BLD = self.condition(z, t, y_BD, ground)
        c, cos, sin = flatten(c_BLD), self.rope_cos[K:], self.rope_sin[K:]
        stream = TokenStream(flatten(self.patch_embed(z)[0])[:, None])
        for number, block in enumerate(self.patch_blocks):
            if number == self.context_start:
                context = y_BD[:, None] + self.context_position
                stream = TokenStream(flatten(torch.cat([context, by_image(stream, L)], dim=1))[:, None])
                mean = c_BLD.mean(dim=1, keepdim=True).expand(-1, K, -1)
                c, cos, sin = flatten(torch.cat([mean, c_BLD], dim=1)), self.rope_cos, self.rope_sin
            stream = TokenStream(*block(*stream, c, cos, sin))
            if number + 1 == tap:
                tapped = by_image(stream, len(cos))[:, -L:]
        x_T1F = self.head(flatten(by_image(stream, len(cos))[:, -L:])[:, None], flatten(c_BLD))
        prediction = self.unpatchify(x_T1F)
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
        """The modules that recomputation and compilation take one by one."""
        return [*self.patch_blocks, self.grounding.block]

    def whole_modules(self) -> list[nn.Module]:
        """The modules that read parameters of children which they do not call: ZeRO-3 must gather each as a whole."""
        return [*self.blocks(), self.head]

    def unpatchify(self, x_T1F: Tensor) -> Tensor:
        n, p = self.grid, self.patch_size
        return rearrange(x_T1F, "(B h w) 1 (p q C) -> B C (h p) (w q)", h=n, w=n, p=p, q=p)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        self._dino[0]._apply(fn, recurse)
        return super()._apply(fn, recurse)


def flatten(x_BLD: Tensor) -> Tensor:
    """Tokens of all images in one list: [T, D]."""
    return rearrange(x_BLD, "B L D -> (B L) D")


def by_image(stream: TokenStream, length: int) -> Tensor:
    """The tokens of a stream that has `length` of them an image: [B, length, D]."""
    return rearrange(stream.settle(), "(B N) 1 D -> B N D", N=length)


def build(config: Config, image_size: int, num_classes: int) -> PixelDiT2:
    """The model of a configuration: fresh weights, beside the DINO's own."""
    return PixelDiT2(config, image_size, num_classes)
