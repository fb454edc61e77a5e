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

from pixelgen_fast.models.layers import (
    Attention,
    Float32Tables,
    RMSNorm,
    SwiGLU,
    TimestepEmbedder,
    rope_2d_axial,
    sincos_2d,
)
from pixelgen_fast.models.pixeldit import TokenStream


@dataclass
class Config:
    """Size of a JiT. The defaults are B/16."""

    system: str = "jit"
    hidden_size: int = 768
    num_heads: int = 12
    depth: int = 12
    patch_size: int = 16
    # width that a patch is squeezed to on its way in
    bottleneck: int = 128
    # class tokens in front of the patches, and the block, counted from 0, that sees them first
    context_length: int = 32
    context_start: int = 4
    # of attention and feed-forward layers in the middle half of the blocks
    dropout: float = 0.0


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


class Block(nn.Module):
    """Transformer block with AdaLN, rotary attention and SwiGLU, biases everywhere; (x, branch, gate) in and out.

    c [B, D] comes after its SiLU, which is the same for all blocks.
    """

    def __init__(self, dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = RMSNorm(dim)
        self.attn = Attention(dim, num_heads, qkv_bias=True, dropout=dropout)
        self.norm2 = RMSNorm(dim)
        self.mlp = SwiGLU(dim, int(2 * 4 * dim / 3), bias=True, dropout=dropout)
        self.modulation = nn.Linear(dim, 6 * dim)

    def forward(
        self, x: Tensor, branch: Tensor | None, gate: Tensor | None, c_BD: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c_BD).chunk(6, dim=-1)
        h, x = norm_modulate(x, self.norm1.weight, shift1, scale1, branch, gate)
        h, x = norm_modulate(x, self.norm2.weight, shift2, scale2, self.attn(h, cos, sin), gate1)
        return x, self.mlp(h), gate2


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


class JiT(Float32Tables):
    """forward(z [B, 3, S, S], t [B] in [0, 1], y int64 [B]) -> [B, 3, S, S]; y = num_classes is the null class.

    With tap = k, from 1 to tap_depth, `forward` returns a pair, whose second is the patch tokens after block k
    [B, L, D], for feature alignment. Raises ValueError for other images or another tap.
    """

    def __init__(self, config: Config, image_size: int, num_classes: int) -> None:
        super().__init__()
        check(config, image_size)
        p, D, K = config.patch_size, config.hidden_size, config.context_length
        self.patch_size, self.grid = p, image_size // p
        self.image_size, self.num_classes = image_size, num_classes
        self.hidden_size, self.tap_depth = D, config.depth
        self.context_length, self.context_start = K, config.context_start
        # the trainer seeds the generator before each step of such a model, so that a resumed run repeats its steps
        self.uses_randomness = config.dropout > 0
        self.patch_embed = BottleneckEmbed(p, config.bottleneck, D)
        self.t_embed = TimestepEmbedder(D, max_period=1e4)
        self.y_embed = nn.Embedding(num_classes + 1, D)
        self.context_position = nn.Parameter(torch.empty(K, D)) if K else None
        # dropout acts in blocks i with depth / 4 <= i < 3 depth / 4
        middle = range(config.depth // 4, 3 * (config.depth // 4))
        self.transformer = nn.ModuleList(
            Block(D, config.num_heads, config.dropout if i in middle else 0.0) for i in range(config.depth)
        )
        self.head = Head(p, D)

        cos, sin = rope_2d_axial(self.grid, self.grid, D // config.num_heads)
        # context tokens stand nowhere: they are not turned
        cos, sin = F.pad(cos, (0, 0, K, 0), value=1.0), F.pad(sin, (0, 0, K, 0))
        self.register_buffer("rope_cos", cos, persistent=False)
        self.register_buffer("rope_sin", sin, persistent=False)
        self.register_buffer("position", sincos_2d(self.grid, self.grid, D).flatten(0, 1), persistent=False)
        self.initialise()

    def initialise(self) -> None:
        """Zero modulation and head, so that the first output is 0 and blocks start as the identity."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.y_embed.weight, std=0.02)
        nn.init.normal_(self.t_embed.mlp[0].weight, std=0.02)
        nn.init.normal_(self.t_embed.mlp[2].weight, std=0.02)
        if self.context_position is not None:
            nn.init.normal_(self.context_position, std=0.02)
        for linear in (self.head.linear, self.head.modulation, *(b.modulation for b in self.transformer)):
            nn.init.zeros_(linear.weight)

    def forward(self, z: Tensor, t: Tensor, y: Tensor, tap: int | None = None) -> Tensor | tuple[Tensor, Tensor]:
        if tuple(z.shape[1:]) != (3, self.image_size, self.image_size):
            wanted = [3, self.image_size, self.image_size]
            raise ValueError(f"JiT was built for images [B, *{wanted}], got [B, *{list(z.shape[1:])}]")
        if tap is not None and not 1 <= tap <= self.tap_depth:
            raise ValueError(f"tap {tap}: this JiT has blocks 1 to {self.tap_depth}")
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
        prediction = self.unpatchify(self.head(*stream, c_BD, context))
        return prediction if tap is None else (prediction, tapped)

    def blocks(self) -> list[nn.Module]:
        """The modules that recomputation and compilation take one by one."""
        return [*self.transformer]

    def whole_modules(self) -> list[nn.Module]:
        """The modules that read parameters of children which they do not call: ZeRO-3 must gather each as a whole."""
        return [*self.transformer, self.head]

    def unpatchify(self, patches_BLF: Tensor) -> Tensor:
        n, p = self.grid, self.patch_size
        return rearrange(patches_BLF, "B (h w) (p q C) -> B C (h p) (w q)", h=n, w=n, p=p, q=p)


def check(config: Config, image_size: int) -> None:
    """Raise ValueError, naming the setting and its value, for what no JiT can be built from."""
    if image_size % config.patch_size:
        raise ValueError(
            f"data.image_size {image_size} does not divide into model.patch_size {config.patch_size} patches"
        )
    if min(config.depth, config.bottleneck) < 1:
        raise ValueError(f"model.depth {config.depth} and model.bottleneck {config.bottleneck} must be at least 1")
    if config.context_length < 0:
        raise ValueError(f"model.context_length {config.context_length} must not be negative; 0 is no context tokens")
    if config.context_length and not 0 <= config.context_start < config.depth:
        raise ValueError(
            f"model.context_start {config.context_start} names no block; model.depth {config.depth} has blocks 0 to "
            f"{config.depth - 1}"
        )
    if not 0 <= config.dropout < 1:
        raise ValueError(f"model.dropout {config.dropout} is a probability in [0, 1)")


def build(config: Config, image_size: int, num_classes: int) -> JiT:
    """The model of a configuration, with fresh weights."""
    return JiT(config, image_size, num_classes)
