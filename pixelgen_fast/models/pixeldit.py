"""PixelDiT: a patch transformer and a light pixel head, both on pixels (arXiv 2511.20645).

    c      = SiLU(embed(t) + embed(y))
    s      = patch blocks (patch_projection(z), c)                       L tokens of width D
    pixels = pixel blocks (embed(pixels of z) + position, SiLU(embed(t) + s))    P pixels of C channels a patch
    output = Linear(RMSNorm(pixels))                                     3 channels a pixel

Shapes: B batch, L patches, P pixels per patch, N = B L, D width, C pixel channels, H heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch.nn.functional as F
from einops import rearrange
from pixelgen_kernels import (
    PixelAttentionWeights,
    flow_loss,
    norm_modulate,
    pixel_attention,
    pixel_mlp,
    pixel_modulate,
)
from torch import Tensor, nn

from pixelgen_fast.models.layers import (
    Attention,
    Float32Tables,
    Noising,
    PatchEmbed,
    RMSNorm,
    SwiGLU,
    TimestepEmbedder,
    rope_2d,
    sincos_2d,
)


@dataclass
class Config:
    """Size of a PixelDiT. The defaults are XL/16."""

    system: str = "pixeldit"
    hidden_size: int = 1152
    num_heads: int = 16
    patch_depth: int = 26
    patch_size: int = 16
    pixel_hidden_size: int = 16
    pixel_depth: int = 4
    pixel_mlp_ratio: int = 4
    # four modulations, on the outputs of the branches, instead of six with gates: stable, no identity at the start
    post_modulation: bool = False
    gelu_tanh: bool = False
    # what the pixel head's attention keeps for backward: its activations, or nothing but its inputs
    pixel_attention_save: Literal["store", "recompute"] = "store"
    # keep the pixel stream in float32 when the weights are bf16, as the published code does
    pixel_stream_float32: bool = False


class TokenStream(NamedTuple):
    """The token stream x [B, L, D] with a pending x += gate * branch, which the next norm folds in."""

    x: Tensor
    branch: Tensor | None = None
    gate: Tensor | None = None

    def settle(self) -> Tensor:
        return self.x if self.branch is None else self.x + self.gate[:, None] * self.branch


class PatchBlock(nn.Module):
    """Transformer block with AdaLN, rotary attention and SwiGLU; (x, branch, gate) in and out."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = RMSNorm(dim)
        self.attn = Attention(dim, num_heads)
        self.norm2 = RMSNorm(dim)
        self.mlp = SwiGLU(dim, int(2 * 4 * dim / 3))
        self.modulation = nn.Linear(dim, 6 * dim)

    def forward(
        self, x: Tensor, branch: Tensor | None, gate: Tensor | None, c_BD: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c_BD).chunk(6, dim=-1)
        h, x = norm_modulate(x, self.norm1.weight, shift1, scale1, branch, gate)
        h, x = norm_modulate(x, self.norm2.weight, shift2, scale2, self.attn(h, cos, sin), gate1)
        return x, self.mlp(h), gate2


class PixelBlock(nn.Module):
    """Pixel block: global attention over compacted patch tokens, then an MLP on every pixel. [N, P, C] -> [N, P, C].

    The modulation is two projections of the patch condition s [N, D]: the part that the attention branch reads and
    the part that the pixel MLP reads. A row of either weight is (pixel, slot, channel).
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        D, C, P = config.hidden_size, config.pixel_hidden_size, config.patch_size**2
        self.post, self.gelu, self.num_heads = config.post_modulation, config.gelu_tanh, config.num_heads
        self.save = config.pixel_attention_save
        self.norm1 = RMSNorm(C)
        self.modulation_attn = None if self.post else nn.Linear(D, P * 2 * C)
        self.compress = nn.Linear(P * C, D)
        self.attn = Attention(D, config.num_heads)
        self.expand = nn.Linear(D, P * C)
        self.norm2 = RMSNorm(C)
        self.modulation_mlp = nn.Linear(D, P * 4 * C)
        self.fc1 = nn.Linear(C, config.pixel_mlp_ratio * C)
        self.fc2 = nn.Linear(config.pixel_mlp_ratio * C, C)

    def attention_weights(self) -> PixelAttentionWeights:
        return PixelAttentionWeights(
            self.norm1.weight,
            self.compress.weight,
            self.compress.bias,
            self.attn.qkv.weight,
            self.attn.q_norm.weight,
            self.attn.k_norm.weight,
            self.attn.proj.weight,
            self.attn.proj.bias,
            self.expand.weight,
            self.expand.bias,
        )

    def forward(self, x_NPC: Tensor, s_ND: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        N, P, C = x_NPC.shape
        modulation = None if self.post else self.modulation_attn(s_ND).view(N, P, 2 * C)
        weights = self.attention_weights()
        e_NPC = pixel_attention(x_NPC, modulation, weights, cos, sin, self.num_heads, save=self.save)
        return pixel_mlp(
            x_NPC,
            e_NPC,
            self.modulation_mlp(s_ND).view(N, P, 4 * C),
            self.norm2.weight,
            self.fc1.weight,
            self.fc1.bias,
            self.fc2.weight,
            self.fc2.bias,
            post=self.post,
            gelu="tanh" if self.gelu else "none",
        )


class Head(nn.Module):
    """RMSNorm over the channels of a pixel, then Linear to its 3 channels.

    forward(x [N, P, C]) -> [N, P, 3]
    forward(x, target [N, P, 3], weight [B]) -> weighted mean squared error of each image, float32 [B]
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = RMSNorm(channels)
        self.linear = nn.Linear(channels, 3)

    def forward(self, x_NPC: Tensor, target_NP3: Tensor | None = None, weight_B: Tensor | None = None) -> Tensor:
        if target_NP3 is None:
            return self.linear(pixel_modulate(x_NPC, self.norm.weight).to(self.linear.weight.dtype))
        return flow_loss(x_NPC, self.norm.weight, self.linear.weight, self.linear.bias, target_NP3, weight_B)


class PatchTransformer(Float32Tables):
    """What PixelDiT and DeCo share; a subclass makes patch_blocks, tap_depth and the rotary tables."""

    patch_blocks: nn.ModuleList
    tap_depth: int
    system = "PixelDiT"

    def patch_stage(self, tokens_BLD: Tensor, c_BD: Tensor, tap: int | None) -> tuple[Tensor, Tensor | None]:
        """Patch tokens through the patch blocks: the semantic tokens s [B, L, D], and those after block `tap`."""
        if tap is not None and not 1 <= tap <= self.tap_depth:
            raise ValueError(f"tap {tap}: this {self.system} has patch blocks 1 to {self.tap_depth}")
        stream, tapped = TokenStream(tokens_BLD), None
        for number, block in enumerate(self.patch_blocks, start=1):
            stream = TokenStream(*block(*stream, c_BD, self.rope_cos, self.rope_sin))
            if number == tap:
                tapped = stream.settle()
        return stream.settle(), tapped


class PixelDiT(PatchTransformer):
    """forward(z [B, 3, S, S], t [B] in [0, 1], y int64 [B]) -> [B, 3, S, S]; y = num_classes is the null class.

    With tap = k, from 1 to tap_depth, both `forward` and `velocity_loss` return a pair, whose second is the token
    stream after patch block k [B, L, D], for feature alignment. Raises ValueError for other images or another tap.

    patch_embed: what gives the tokens instead of the linear embedding of patches, for systems built on this one.
    """

    def __init__(self, config: Config, image_size: int, num_classes: int, patch_embed: nn.Linear | None = None) -> None:
        super().__init__()
        p, D, C = config.patch_size, config.hidden_size, config.pixel_hidden_size
        if image_size % p:
            raise ValueError(f"data.image_size {image_size} does not divide into model.patch_size {p} patches")
        if config.pixel_depth < 1 or (config.patch_depth < 1 and patch_embed is None):
            raise ValueError(
                f"model.patch_depth {config.patch_depth} and model.pixel_depth {config.pixel_depth} must be at least 1"
            )
        self.patch_size, self.grid = p, image_size // p
        self.image_size, self.num_classes = image_size, num_classes
        self.hidden_size, self.tap_depth = D, config.patch_depth
        self.pixel_stream_float32 = config.pixel_stream_float32
        self.patch_embed = patch_embed or PatchEmbed(p, D)
        self.pixel_embed = nn.Linear(3, C)
        self.t_embed = TimestepEmbedder(D, max_period=10.0)
        self.y_embed = nn.Embedding(num_classes + 1, D)
        self.patch_blocks = nn.ModuleList(PatchBlock(D, config.num_heads) for _ in range(config.patch_depth))
        self.pixel_blocks = nn.ModuleList(PixelBlock(config) for _ in range(config.pixel_depth))
        self.head = Head(C)

        cos, sin = rope_2d(self.grid, self.grid, D // config.num_heads)
        position = rearrange(sincos_2d(image_size, image_size, C), "(h p) (w q) C -> (h w) (p q) C", p=p, q=p)
        self.register_buffer("rope_cos", cos, persistent=False)
        self.register_buffer("rope_sin", sin, persistent=False)
        self.register_buffer("pixel_position", position, persistent=False)
        self.initialise()

    def initialise(self) -> None:
        """Zero modulation and head, so that the first output is 0 and gated blocks start as the identity."""
        nn.init.xavier_uniform_(self.patch_embed.weight)
        nn.init.zeros_(self.patch_embed.bias)
        nn.init.normal_(self.y_embed.weight, std=0.02)
        nn.init.normal_(self.t_embed.mlp[0].weight, std=0.02)
        nn.init.normal_(self.t_embed.mlp[2].weight, std=0.02)
        zero = [
            self.head.linear,
            *(b.modulation for b in self.patch_blocks),
            *(b.modulation_mlp for b in self.pixel_blocks),
        ]
        zero += [b.modulation_attn for b in self.pixel_blocks if b.modulation_attn is not None]
        for linear in zero:
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, z: Tensor, t: Tensor, y: Tensor, tap: int | None = None) -> Tensor | tuple[Tensor, Tensor]:
        self._check(z.shape[1:], (3, self.image_size, self.image_size))
        t_BD = self.t_embed(t)
        tokens, pixels = self.patch_embed(z)
        s_BLD, tapped = self.patch_stage(tokens, F.silu(t_BD + self.y_embed(y)), tap)
        prediction = self.unpatchify(self.head(self.pixel_stage(pixels, F.silu(t_BD[:, None] + s_BLD))))
        return prediction if tap is None else (prediction, tapped)

    def velocity_loss(
        self, images: Tensor, y: Tensor, noising: Noising, weight_B: Tensor, tap: int | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Weighted squared error of the predicted velocity, float32 [B], with noising and loss inside the operators.

        images: uint8 [B, S, S, 3]. y: int64 [B]. weight: float32 [B]. The same as `forward` on the noised images and
        `diffusion.loss.flow_loss`, without the noised images and the prediction in memory.
        """
        self._check(images.shape[1:], (self.image_size, self.image_size, 3))
        t_BD = self.t_embed(noising.t)
        tokens, pixels, velocity = self.patch_embed(images, noising)
        s_BLD, tapped = self.patch_stage(tokens, F.silu(t_BD + self.y_embed(y)), tap)
        x_NPC = self.pixel_stage(pixels, F.silu(t_BD[:, None] + s_BLD))
        loss_B = self.head(x_NPC, velocity.flatten(0, 1), weight_B)
        return loss_B if tap is None else (loss_B, tapped)

    def blocks(self) -> list[nn.Module]:
        """The modules that recomputation and compilation take one by one."""
        return [*self.patch_blocks, *self.pixel_blocks]

    def whole_modules(self) -> list[nn.Module]:
        """The modules that read parameters of children which they do not call: ZeRO-3 must gather each as a whole."""
        return [*self.blocks(), self.head]

    def pixel_stage(self, pixels_BLPC: Tensor, s_BLD: Tensor) -> Tensor:
        """Noised pixels [B, L, P, 3] and their patch condition through the pixel blocks: stream [B L, P, C]."""
        pixels_BLPC = self.pixel_embed(pixels_BLPC)
        position = self.pixel_position if self.pixel_stream_float32 else self.pixel_position.to(pixels_BLPC.dtype)
        x_NPC = rearrange(pixels_BLPC + position, "B L P C -> (B L) P C")
        s_ND = rearrange(s_BLD, "B L D -> (B L) D")
        for block in self.pixel_blocks:
            x_NPC = block(x_NPC, s_ND, self.rope_cos, self.rope_sin)
        return x_NPC

    def _check(self, found: tuple[int, ...], wanted: tuple[int, ...]) -> None:
        if tuple(found) != wanted:
            raise ValueError(f"PixelDiT was built for images [B, *{list(wanted)}], got [B, *{list(found)}]")

    def unpatchify(self, pixels_NPC: Tensor) -> Tensor:
        n, p = self.grid, self.patch_size
        return rearrange(pixels_NPC, "(B h w) (p q) C -> B C (h p) (w q)", h=n, w=n, p=p, q=p)


def build(config: Config, image_size: int, num_classes: int) -> PixelDiT:
    """The model of a configuration, with fresh weights."""
    return PixelDiT(config, image_size, num_classes)
