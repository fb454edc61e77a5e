"""A level of FractalGen (arXiv 2502.17437): what it says of each patch of a crop, told conditions and other patches.

    masked   tokens = [W_g g, W_c c_4, ..., W_c c_0, patches], a masked patch being `mask_token`
             z = the patches' part of LayerNorm(blocks(LayerNorm(tokens + position)))
             inside a patch: five conditions, z of the patch and of those above, right of, below and left of it
    causal   tokens = [W_c c_0, patch_0, patch_1, ...];  z_j, of the token before patch j, is its one condition

g is the guiding pixel, the mean color of the crop, which `guide` draws first (fractal_pixel.py).
Shapes: M crops, L = h w patches of F = 3 p p numbers (channel, row, column), D width, D' of the level above, K
conditions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from pixelgen_fast.layers import Float32Tables, ViTBlock, rope_2d_axial, small_
from pixelgen_fast.models.causal_blocks import KeysValues
from pixelgen_fast.models.fractal_blocks import LAYER_NORM_EPS, LlamaBlock
from pixelgen_fast.models.fractal_pixel import PixelNetwork

NEIGHBOURS = 5
GUIDE_WIDTH, GUIDE_DEPTH, GUIDE_HEADS = 128, 3, 4


class MaskedGenerator(nn.Module):
    """forward(patches [M, L, F], masked bool [M, L], cond [M, 5, D'], guide [M, 3] or None) -> z [M, L, D]."""

    conditions = NEIGHBOURS

    def __init__(
        self, side: int, patch_size: int, above: int, dim: int, num_heads: int, depth: int, dropout: float, guided: bool
    ) -> None:
        super().__init__()
        self.patch_size, self.length, self.front = patch_size, (side // patch_size) ** 2, NEIGHBOURS + guided
        self.guide = PixelNetwork(above, GUIDE_WIDTH, GUIDE_DEPTH, GUIDE_HEADS) if guided else None
        self.guide_embed = nn.Linear(3, dim) if guided else None
        self.cond_embed = nn.Linear(above, dim)
        self.patch_embed = nn.Linear(3 * patch_size**2, dim)
        self.mask_token = nn.Parameter(torch.empty(dim))
        self.position = nn.Parameter(torch.empty(self.front + self.length, dim))
        self.embed_norm = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.blocks = nn.ModuleList(ViTBlock(dim, num_heads, 4 * dim, LAYER_NORM_EPS, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)

    def initialise(self) -> None:
        small_(self.mask_token, self.position)

    def forward(self, patches: Tensor, masked: Tensor, cond: Tensor, guide: Tensor | None) -> Tensor:
        like = self.mask_token
        tokens = torch.where(masked[..., None], like, self.patch_embed(patches.to(like.dtype)))
        front = [self.cond_embed(cond.flip(1))]
        if guide is not None:
            front.insert(0, self.guide_embed(guide.to(like.dtype))[:, None])
        x_MLD = self.embed_norm(torch.cat([*front, tokens], dim=1) + self.position)
        for block in self.blocks:
            x_MLD = block(x_MLD)
        return self.norm(x_MLD)[:, self.front :]

    def inner(self, z_MLD: Tensor) -> Tensor:
        """The conditions of what is inside each patch [M, L, 5, D]."""
        return neighbours(z_MLD)


class CausalGenerator(Float32Tables):
    """forward(patches [M, L, F], masked, cond [M, 1, D'], guide) -> z [M, L, D]; masked and guide are not looked at."""

    conditions = 1
    guide = None

    def __init__(
        self, side: int, patch_size: int, above: int, dim: int, num_heads: int, depth: int, dropout: float
    ) -> None:
        super().__init__()
        grid = side // patch_size
        self.patch_size, self.length = patch_size, grid**2
        self.cond_embed = nn.Linear(above, dim)
        self.patch_embed = nn.Linear(3 * patch_size**2, dim)
        # one row more than is read: the published network sees the last patch too, which tells nothing of any other
        self.position = nn.Parameter(torch.empty(1 + self.length, dim))
        self.embed_norm = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.blocks = nn.ModuleList(LlamaBlock(dim, num_heads, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        # the condition has no place: its query and key become zero
        for name, table in zip(("cos", "sin"), rope_2d_axial(grid, grid, dim // num_heads), strict=True):
            self.register_buffer(f"rope_{name}", F.pad(table, (0, 0, 1, 0)), persistent=False)

    def initialise(self) -> None:
        small_(self.position)

    def forward(self, patches: Tensor, masked: Tensor | None, cond: Tensor, guide: Tensor | None) -> Tensor:
        L, like = self.length, self.position
        tokens = torch.cat([self.cond_embed(cond), self.patch_embed(patches[:, :-1].to(like.dtype))], dim=1)
        x_MLD = self.embed_norm(tokens + self.position[:L])
        for block in self.blocks:
            x_MLD = block(x_MLD, self.rope_cos[:L], self.rope_sin[:L])
        return self.norm(x_MLD)

    def inner(self, z_MLD: Tensor) -> Tensor:
        """The condition of what is inside each patch [M, L, 1, D]."""
        return z_MLD[:, :, None]

    def begin(self, rows: int) -> list[KeysValues]:
        """An empty cache of each block, for crops that are drawn patch by patch."""
        return [block.past(rows, self.length) for block in self.blocks]

    def extend(self, before: Tensor, pasts: list[KeysValues]) -> Tensor:
        """z [M, D] of one more patch. before: the patch before it [M, F], or [M, D'] the condition of the first."""
        j = pasts[0].length
        token = (self.patch_embed if j else self.cond_embed)(before.to(self.position.dtype))
        x = self.embed_norm(token + self.position[j])[:, None]
        for block, past in zip(self.blocks, pasts, strict=True):
            x = block(x, self.rope_cos[j : j + 1], self.rope_sin[j : j + 1], past)
        return self.norm(x)[:, 0]


def neighbours(z_MLD: Tensor) -> Tensor:
    """z of each patch and of those above, right of, below and left of it, zero outside: [M, L, 5, D]."""
    side = round(z_MLD.shape[1] ** 0.5)
    z = F.pad(rearrange(z_MLD, "M (h w) D -> M h w D", h=side), (0, 0, 1, 1, 1, 1))
    rows, columns = (1, 0, 1, 2, 1), (1, 1, 2, 1, 0)
    around = [z[:, r : r + side, c : c + side] for r, c in zip(rows, columns, strict=True)]
    return torch.stack(around, dim=3).flatten(1, 2)
