"""The centre crop of ADM (Dhariwal and Nichol, "Diffusion Models Beat GANs", 2021; released with guided-diffusion).

For an image with shorter side m and a target of S pixels:
    while m >= 2 S: halve both sides, rounding down, with a box filter;
    resize with a bicubic filter (antialiased when it shrinks) by S / m, sides rounded to the nearest integer;
    cut the middle S x S, offsets rounded down.
A smaller image is enlarged by the same bicubic step. EXIF orientation is not applied: published figures rest on that.

`crop_plan` is that arithmetic alone, which the loader follows; `centre_crop` is the procedure in PIL, the reference
that the loader is tested against and the code that packs data sets.
"""

from __future__ import annotations

from typing import NamedTuple

from PIL import Image


class CropPlan(NamedTuple):
    """halved: (height, width) after each halving, in order; resized: (height, width) before the cut; offset: (y, x)."""

    halved: list[tuple[int, int]]
    resized: tuple[int, int]
    offset: tuple[int, int]


def crop_plan(height: int, width: int, size: int) -> CropPlan:
    """The sizes through which an image of height x width pixels passes on its way to size x size.

    Raises ValueError unless all three are positive.
    """
    if min(height, width, size) < 1:
        raise ValueError(f"cannot crop {height} x {width} pixels to {size}: sides must be positive")
    halved = []
    while min(height, width) >= 2 * size:
        height, width = height // 2, width // 2
        halved.append((height, width))
    scale = size / min(height, width)
    resized = (round(height * scale), round(width * scale))
    return CropPlan(halved, resized, ((resized[0] - size) // 2, (resized[1] - size) // 2))


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """Crop a PIL image of any size and an 8-bit mode to size x size pixels by the procedure above."""
    plan = crop_plan(image.height, image.width, size)
    for height, width in plan.halved:
        image = image.resize((width, height), Image.Resampling.BOX)
    image = image.resize(plan.resized[::-1], Image.Resampling.BICUBIC)
    y, x = plan.offset
    return image.crop((x, y, x + size, y + size))
