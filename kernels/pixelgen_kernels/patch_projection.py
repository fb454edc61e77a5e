"""An image as patch tokens and as patch-major pixels.

    pixels[b, l, p] = z[b, :, row, column]            l, p row-major over patches and over the pixels inside one
    tokens[b, l]    = W z_patch + bias                with the features of a patch ordered (channel, row, column)

The convolution with kernel = stride = patch of ViT (arXiv 2010.11929) section 3.1, written as a matrix product.
Shapes: z [B, 3, H, W]; tokens [B, L, D]; pixels [B, L, P, 3]; W [D, 3 P]; bias [D].
"""

from __future__ import annotations

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


def patch_projection_reference(z_BCHW: Tensor, weight: Tensor, bias: Tensor, patch: int) -> tuple[Tensor, Tensor]:
    features = rearrange(z_BCHW, "B C (h p) (w q) -> B (h w) (C p q)", p=patch, q=patch)
    pixels = rearrange(features, "B L (C P) -> B L P C", C=z_BCHW.shape[1])
    return F.linear(features, weight, bias), pixels


def patch_projection(z_BCHW: Tensor, weight: Tensor, bias: Tensor, patch: int) -> tuple[Tensor, Tensor]:
    """Return (tokens [B, L, D], pixels [B, L, P, 3]).

    Raises ValueError when the image does not divide into patches or the weight does not fit.
    """
    C, H, W = z_BCHW.shape[1:]
    if H % patch or W % patch:
        raise ValueError(f"patch_projection: image {H} x {W} does not divide into {patch} x {patch} patches")
    if weight.shape[1] != C * patch * patch or bias.shape != weight.shape[:1]:
        raise ValueError(
            f"patch_projection: {C} channels and patch {patch} need weight [D, {C * patch * patch}] and bias [D], "
            f"got {list(weight.shape)}, {list(bias.shape)}"
        )
    return patch_projection_reference(z_BCHW, weight, bias, patch)
