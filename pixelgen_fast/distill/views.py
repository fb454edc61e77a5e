"""Random views of images, made for a whole batch at once, and masks of their patches.

    view(u) = brightness image(A u + c + w(u)) + noise,    u in [-1, 1]^2, clipped to [0, 1]

A turns by a random angle and scales to a random share of the area and ratio of the sides; c is a random place where
the shown part lies inside the image, or the image inside the shown part; w is a smooth field, three by three normals
enlarged. What lies outside of the image is black.

Shapes: B images, S pixels a side, s those of a view, L patches.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from pixelgen_fast.distill.schema import Views

_WARP_POINTS = 3


def draw_views(images: Tensor, size: int, area: tuple[float, float], views: Views, source: Generator) -> Tensor:
    """One view of each image: float [B, 3, S, S] in [0, 1] -> [B, 3, s, s], s = size. source: on the images' device."""
    B, device = len(images), images.device

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(B, generator=source, device=device)

    angle = uniform(-1, 1) * math.radians(views.rotation)
    side, ratio = uniform(*area).sqrt(), torch.exp(uniform(-1, 1) * views.aspect / 2)
    width, height = side * ratio, side / ratio
    if views.flip:
        width = width * torch.sign(uniform(-1, 1))
    x, y = uniform(-1, 1) * (1 - width.abs()).abs(), uniform(-1, 1) * (1 - height).abs()
    cos, sin = angle.cos(), angle.sin()
    affine = torch.stack([cos * width, -sin * height, x, sin * width, cos * height, y], dim=1).view(B, 2, 3)
    grid = F.affine_grid(affine, [B, 3, size, size], align_corners=False)
    points = torch.randn(B, 2, _WARP_POINTS, _WARP_POINTS, generator=source, device=device) * views.warp
    warp = F.interpolate(points, (size, size), mode="bicubic", align_corners=True)
    seen = F.grid_sample(images, grid + warp.permute(0, 2, 3, 1), mode="bilinear", align_corners=False)
    brightness = uniform(1 - views.brightness, 1 + views.brightness)[:, None, None, None]
    noise = torch.randn(seen.shape, generator=source, device=device) * views.noise
    return (seen * brightness + noise).clamp(0, 1)


def draw_masks(count: int, patches: int, views: Views, source: Generator) -> Tensor:
    """Which patches of each of `count` views are hidden, bool [count, L].

    views.masked of the views, rounded, hide at least one patch each, the others none.
    """
    device = source.device
    low, high = views.mask_share
    share = low + (high - low) * torch.rand(count, generator=source, device=device)
    chosen = _random_ranks((count,), source) < round(views.masked * count)
    hidden = (share * patches).round().clamp(min=1) * chosen
    return _random_ranks((count, patches), source) < hidden[:, None]


def _random_ranks(shape: tuple[int, ...], source: Generator) -> Tensor:
    """A random permutation of 0, 1, ... along the last dimension."""
    return torch.rand(shape, generator=source, device=source.device).argsort(dim=-1)
