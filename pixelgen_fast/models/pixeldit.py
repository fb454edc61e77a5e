"""PixelDiT: a patch transformer and a light pixel head, both on pixels (arXiv 2511.20645).

    c      = SiLU(embed(t) + embed(y))
    s      = patch blocks (patch_projection(z), c)                       L tokens of width D
    pixels = pixel blocks (embed(pixels of z) + position, SiLU(embed(t) + s))    P pixels of C channels a patch
    output = Linear(RMSNorm(pixels))                                     3 channels a pixel

With registers, K learned tokens stand before the patches in the patch blocks, without rotation, and end there: room for
what belongs to no patch (arXiv 2309.16588, and for transformers on pixels 2605.16147).

Shapes: B batch, L patches, P pixels per patch, N = B L, D width, C pixel channels, H heads, K registers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from pixelgen_kernels import (
    PixelAttentionWeights,
    flow_loss,
    pixel_attention,
    pixel_mlp,
    pixel_modulate,
)
from torch import Tensor, nn

from pixelgen_fast.diffusion.path import Noising
from pixelgen_fast.errors import InputError
from pixelgen_fast.layers import (
    Attention,
    PatchEmbed,
    RMSNorm,
    TimestepEmbedder,
    rope_2d,
    sincos_2d,
    small_,
    unpatchify,
    zero_,
)
from pixelgen_fast.models import system
from pixelgen_fast.models.blocks import TokenStream, TransformerBlock
from pixelgen_fast.models.system import System, depth_setting, width_setting
from pixelgen_fast.settings import above, at_least


@dataclass
class Settings(system.Settings):
    """Size of a PixelDiT. The defaults are XL/16."""

    system: str = "pixeldit"
    hidden_size: int = 1152
    num_heads: int = 16
    patch_depth: int = depth_setting(26, least=0)
    patch_size: int = 16
    pixel_hidden_size: int = width_setting(16)
    pixel_depth: int = depth_setting(4)
    pixel_mlp_ratio: int = above(0, default=4, most=64)
    # four modulations, on the outputs of the branches, instead of six with gates: stable, no identity at the start
    post_modulation: bool = False
    gelu_tanh: bool = False
    # what the pixel head's attention keeps for backward: its activations, or nothing but its inputs
    pixel_attention_save: Literal["store", "recompute"] = "store"
    # keep the pixel stream in float32 when the weights are bf16, as the published code does
    pixel_stream_float32: bool = False
    # learned tokens before the patches, for the patch blocks alone
    registers: int = at_least(0, default=0, most=65_536)


class PixelBlock(nn.Module):
    """Pixel block: global attention over compacted patch tokens, then an MLP on every pixel. [N, P, C] -> [N, P, C].

    The modulation is two projections of the patch condition s [N, D]: the part that the attention branch reads and
    the part that the pixel MLP reads. A row of either weight is (pixel, slot, channel).
    """

    stacked: ClassVar[dict[str, int]] = {"modulation_attn": 0, "modulation_mlp": 0}

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        D, C, P = settings.hidden_size, settings.pixel_hidden_size, settings.patch_size**2
        self.post, self.gelu, self.num_heads = settings.post_modulation, settings.gelu_tanh, settings.num_heads
        self.save = settings.pixel_attention_save
        self.norm1 = RMSNorm(C)
        self.modulation_attn = None if self.post else nn.Linear(D, P * 2 * C)
        self.compress = nn.Linear(P * C, D)
        self.attn = Attention(D, settings.num_heads)
        self.expand = nn.Linear(D, P * C)
        self.norm2 = RMSNorm(C)
        self.modulation_mlp = nn.Linear(D, P * 4 * C)
        self.fc1 = nn.Linear(C, settings.pixel_mlp_ratio * C)
        self.fc2 = nn.Linear(settings.pixel_mlp_ratio * C, C)

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


class Registers(nn.Module):
    """Learned tokens before those of the patches: [B, L, D] -> [B, K + L, D]."""

    def __init__(self, count: int, dim: int) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.empty(count, dim))

    def forward(self, tokens_BLD: Tensor) -> Tensor:
        return torch.cat([self.tokens.expand(len(tokens_BLD), -1, -1), tokens_BLD], dim=1)


class PatchTransformer(System):
    """What PixelDiT and DeCo share; a subclass makes patch_blocks and the rotary tables."""

    patch_blocks: nn.ModuleList

    def patch_stage(self, tokens_BLD: Tensor, c_BD: Tensor, tap: int | None) -> tuple[Tensor, Tensor | None]:
        """Patch tokens through the patch blocks: the semantic tokens s [B, L, D], and those after block `tap`."""
        stream, tapped = TokenStream(tokens_BLD), None
        for number, block in enumerate(self.patch_blocks, start=1):
            stream = TokenStream(*block(*stream, c_BD, self.rope_cos, self.rope_sin))
            if number == tap:
                tapped = stream.settle()
        return stream.settle(), tapped


class PixelDiT(PatchTransformer):
    """The System of this module.

    patch_embed: what gives the tokens instead of the linear embedding of patches, for systems built on this one.
    """

    fuses_loss: ClassVar[bool] = True

    def __init__(
        self, settings: Settings, image_size: int, num_classes: int, patch_embed: nn.Linear | None = None
    ) -> None:
        super().__init__(settings, image_size, num_classes, tap_depth=settings.patch_depth)
        p, D, C = settings.patch_size, settings.hidden_size, settings.pixel_hidden_size
        if settings.pixel_depth < 1 or (settings.patch_depth < 1 and patch_embed is None):
            raise InputError(
                f"model.patch_depth {settings.patch_depth} and model.pixel_depth {settings.pixel_depth} must be "
                "at least 1"
            )
        if settings.registers and settings.patch_depth < 1:
            raise InputError(
                f"model.registers {settings.registers} are for patch blocks, of which model.patch_depth "
                f"{settings.patch_depth} has none; set registers to 0"
            )
        self.pixel_stream_float32 = settings.pixel_stream_float32
        self.patch_embed = patch_embed or PatchEmbed(p, D)
        self.registers = Registers(settings.registers, D) if settings.registers else None
        self.pixel_embed = nn.Linear(3, C)
        self.t_embed = TimestepEmbedder(D, max_period=10.0)
        self.y_embed = nn.Embedding(num_classes + 1, D)
        self.patch_blocks = nn.ModuleList(TransformerBlock(D, settings.num_heads) for _ in range(settings.patch_depth))
        self.pixel_blocks = nn.ModuleList(PixelBlock(settings) for _ in range(settings.pixel_depth))
        self.head = Head(C)

        cos, sin = rope_2d(self.grid, self.grid, self.head_dim)
        # registers stand nowhere: they are not turned
        cos, sin = (F.pad(x, (0, 0, settings.registers, 0), value=v) for x, v in ((cos, 1.0), (sin, 0.0)))
        position = rearrange(sincos_2d(image_size, image_size, C), "(h p) (w q) C -> (h w) (p q) C", p=p, q=p)
        self.register_buffer("rope_cos", cos, persistent=False)
        self.register_buffer("rope_sin", sin, persistent=False)
        self.register_buffer("pixel_position", position, persistent=False)
        self.initialise()

    def initialise(self) -> None:
        """Zero modulation and head, so that the first output is 0 and gated blocks start as the identity."""
        nn.init.xavier_uniform_(self.patch_embed.weight)
        nn.init.zeros_(self.patch_embed.bias)
        small_(self.y_embed.weight, self.t_embed.mlp[0].weight, self.t_embed.mlp[2].weight)
        if self.registers is not None:
            small_(self.registers.tokens)
        zero_([self.head.linear, *(b.modulation for b in self.patch_blocks)])
        zero_(b.modulation_mlp for b in self.pixel_blocks)
        zero_(b.modulation_attn for b in self.pixel_blocks if b.modulation_attn is not None)

    def forward(self, z: Tensor, t: Tensor, y: Tensor, tap: int | None = None) -> Tensor | tuple[Tensor, Tensor]:
        self.check_images(z)
        self.check_tap(tap)
        t_BD = self.t_embed(t)
        tokens, pixels = self.patch_embed(z)
        s_BLD, tapped = self.patch_stage(tokens, F.silu(t_BD + self.y_embed(y)), tap)
        pixels_NP3 = self.head(self.pixel_stage(pixels, F.silu(t_BD[:, None] + s_BLD)))
        prediction = unpatchify(pixels_NP3, self.grid, self.patch_size)
        return prediction if tap is None else (prediction, tapped)

    def velocity_loss(
        self, images: Tensor, y: Tensor, noising: Noising, weight_B: Tensor, tap: int | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """As `System` has it, without the noised images and the prediction in memory."""
        self.check_images(images)
        self.check_tap(tap)
        t_BD = self.t_embed(noising.t)
        tokens, pixels, velocity = self.patch_embed(images, noising)
        s_BLD, tapped = self.patch_stage(tokens, F.silu(t_BD + self.y_embed(y)), tap)
        x_NPC = self.pixel_stage(pixels, F.silu(t_BD[:, None] + s_BLD))
        loss_B = self.head(x_NPC, velocity.flatten(0, 1), weight_B)
        return loss_B if tap is None else (loss_B, tapped)

    def patch_stage(self, tokens_BLD: Tensor, c_BD: Tensor, tap: int | None) -> tuple[Tensor, Tensor | None]:
        if self.registers is None:
            return super().patch_stage(tokens_BLD, c_BD, tap)
        L = tokens_BLD.shape[1]
        s_BLD, tapped = super().patch_stage(self.registers(tokens_BLD), c_BD, tap)
        return s_BLD[:, -L:], None if tapped is None else tapped[:, -L:]

    def blocks(self) -> list[nn.Module]:
        return [*self.patch_blocks, *self.pixel_blocks]

    def whole_modules(self) -> list[nn.Module]:
        return [*self.blocks(), self.head]

    def pixel_stage(self, pixels_BLPC: Tensor, s_BLD: Tensor) -> Tensor:
        """Noised pixels [B, L, P, 3] and their patch condition through the pixel blocks: stream [B L, P, C]."""
        pixels_BLPC = self.pixel_embed(pixels_BLPC)
        position = self.pixel_position if self.pixel_stream_float32 else self.pixel_position.to(pixels_BLPC.dtype)
        x_NPC = rearrange(pixels_BLPC + position, "B L P C -> (B L) P C")
        s_ND = rearrange(s_BLD, "B L D -> (B L) D")
        cos, sin = (table[-(self.grid**2) :] for table in (self.rope_cos, self.rope_sin))
        for block in self.pixel_blocks:
            x_NPC = block(x_NPC, s_ND, cos, sin)
        return x_NPC


def build(settings: Settings, image_size: int, num_classes: int) -> PixelDiT:
    """The model of a configuration, with fresh weights."""
    return PixelDiT(settings, image_size, num_classes)
