"""Networks that tell one patch from its condition z and its noised self; nothing else of the image reaches them.

    forward(u [N, F], t [N], z [N, D]) -> prediction [N, F]
    forward(u, t, z, target [N, F], weight [N]) -> weight mean_F (prediction - target)^2, float32 [N]

MlpHead is MAR's diffusion head (arXiv 2406.11838): y = embed(t) + W z;  h <- h + gate MLP(LN(h) (1 + scale) + shift),
all three of y. PixelHead is PixelDiT's pixel head (arXiv 2511.20645) on patches as images of one patch, z being the
patch condition: its attention then reads one token, and what it adds is the mixing of all pixels of the patch.
Shapes: N patches of F = P C numbers, D width of z, W width of the MLP, P pixels, C their channels.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixelgen_fast.layers import Float32Tables, TimestepEmbedder, sincos_2d, small_, xavier_, zero_
from pixelgen_fast.models import pixeldit
from pixelgen_fast.models.pixeldit import Head, PixelBlock

EPS = 1e-6


class MlpBlock(nn.Module):
    """[N, W] -> [N, W], modulated by y [N, W] after its SiLU."""

    stacked: ClassVar[dict[str, int]] = {"modulation": 0}

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.modulation = nn.Linear(width, 3 * width)

    def forward(self, h_NW: Tensor, y_NW: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(y_NW).chunk(3, dim=-1)
        return h_NW + gate * self.mlp(self.norm(h_NW) * (1 + scale) + shift)


class MlpHead(nn.Module):
    """See above. out: numbers told of a patch, 0 for F. time_scale: what t is multiplied by before it is embedded.

    bottleneck: width that the noised patch is squeezed to on its way in (JiT, arXiv 2511.13720); 0 is none.
    """

    def __init__(
        self,
        patch: int,
        condition: int,
        width: int,
        depth: int,
        *,
        out: int = 0,
        bottleneck: int = 0,
        time_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.time_scale = time_scale
        self.t_embed = TimestepEmbedder(width, max_period=1e4)
        self.condition = nn.Linear(condition, width)
        self.down = nn.Linear(patch, bottleneck, bias=False) if bottleneck else None
        self.enter = nn.Linear(bottleneck or patch, width)
        self.layers = nn.ModuleList(MlpBlock(width) for _ in range(depth))
        self.modulation = nn.Linear(width, 2 * width)
        self.leave = nn.Linear(width, out or patch)
        self.initialise()

    def initialise(self) -> None:
        """Zero modulation and last layer: blocks begin as the identity and the first output is 0."""
        xavier_(self)
        small_(self.t_embed.mlp[0].weight, self.t_embed.mlp[2].weight)
        zero_([self.modulation, self.leave, *(block.modulation for block in self.layers)])

    def blocks(self) -> list[nn.Module]:
        return [*self.layers]

    def whole_modules(self) -> list[nn.Module]:
        return []

    def forward(
        self, u_NF: Tensor, t_N: Tensor, z_ND: Tensor, target_NF: Tensor | None = None, weight_N: Tensor | None = None
    ) -> Tensor:
        y = F.silu(self.t_embed(t_N * self.time_scale) + self.condition(z_ND))
        h = self.enter(u_NF if self.down is None else self.down(u_NF))
        for block in self.layers:
            h = block(h, y)
        shift, scale = self.modulation(y).chunk(2, dim=-1)
        prediction = self.leave(F.layer_norm(h, h.shape[-1:], eps=EPS) * (1 + scale) + shift)
        if target_NF is None:
            return prediction
        wide = torch.promote_types(prediction.dtype, torch.float32)
        return weight_N * (prediction.to(wide) - target_NF).square().mean(dim=-1)


class PixelHead(Float32Tables):
    """See above; a patch is its pixels row by row, three numbers each. settings: the size of the PixelDiT it is of."""

    def __init__(self, settings: pixeldit.Settings) -> None:
        super().__init__()
        p, D, C = settings.patch_size, settings.hidden_size, settings.pixel_hidden_size
        self.t_embed = TimestepEmbedder(D, max_period=10.0)
        self.enter = nn.Linear(3, C)
        self.layers = nn.ModuleList(PixelBlock(settings) for _ in range(settings.pixel_depth))
        self.head = Head(C)
        # one patch stands nowhere: its token is not turned
        cos = torch.ones(1, D // settings.num_heads // 2)
        self.register_buffer("rope_cos", cos, persistent=False)
        self.register_buffer("rope_sin", torch.zeros_like(cos), persistent=False)
        self.register_buffer("pixel_position", sincos_2d(p, p, C).flatten(0, 1), persistent=False)
        self.initialise()

    def initialise(self) -> None:
        """Zero modulation of the pixel MLPs and head, as PixelDiT has it."""
        small_(self.t_embed.mlp[0].weight, self.t_embed.mlp[2].weight)
        zero_([self.head.linear, *(b.modulation_mlp for b in self.layers), *(b.modulation_attn for b in self.layers)])

    def blocks(self) -> list[nn.Module]:
        return [*self.layers]

    def whole_modules(self) -> list[nn.Module]:
        return [*self.layers, self.head]

    def forward(
        self, u_NF: Tensor, t_N: Tensor, z_ND: Tensor, target_NF: Tensor | None = None, weight_N: Tensor | None = None
    ) -> Tensor:
        s_ND = F.silu(self.t_embed(t_N) + z_ND)
        pixels_NP3 = u_NF.unflatten(1, (-1, 3))
        x_NPC = self.enter(pixels_NP3)
        x_NPC = x_NPC + self.pixel_position.to(x_NPC.dtype)
        for block in self.layers:
            x_NPC = block(x_NPC, s_ND, self.rope_cos, self.rope_sin)
        if target_NF is None:
            return self.head(x_NPC).flatten(1)
        return self.head(x_NPC, target_NF.view_as(pixels_NP3).contiguous(), weight_N)
