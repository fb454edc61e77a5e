"""Where an image is cut out, and DiffAug: what the discriminator sees of it (arXiv 2006.10738).

    translation    by whole pixels, up to round(S / 8) in each axis; what comes in is 0
    brightness     x + u - 1/2
    saturation     (x - c) 2 u + c,      c the pixel's mean over channels
    contrast       (x - m) (u + 1/2) + m,   m the image's mean

each u uniform in (0, 1) and of its own, a function of (seed, image number, stream). Differentiable.
Shapes: B images [B, 3, H, H], in float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pixelgen_kernels import philox
from torch import Tensor

# Philox streams beside those that a generator's training draws from
CROP, FOR_DECODER, OF_FAKES, OF_REALS = range(16, 20)
_SHARE = 0.125


def cut_out(images: Tensor, y: Tensor, x: Tensor, size: int) -> Tensor:
    """size x size pixels of each image from row y and column x on: int64 [B] both."""
    steps = torch.arange(size, device=images.device)
    rows, columns = (y[:, None] + steps)[:, None, :, None], (x[:, None] + steps)[:, None, None, :]
    image = torch.arange(len(images), device=images.device)[:, None, None, None]
    return images[image, torch.arange(images.shape[1], device=images.device)[:, None, None], rows, columns]


def random_crop(images: Tensor, size: int, seed: int, numbers: Tensor) -> Tensor:
    """A square of size x size pixels from a place that each image's number draws; numbers: int64 [B]."""
    room = images.shape[-1] - size
    if not room:
        return images
    y, x = _whole(philox.uniform(seed, numbers, CROP, 2), room + 1).unbind(dim=1)
    return cut_out(images, y, x, size)


def augment(x: Tensor, seed: int, numbers: Tensor, stream: int) -> Tensor:
    """DiffAug of images x by what each image's number draws from a stream; numbers: int64 [B]."""
    u = philox.uniform(seed, numbers, stream, 5)
    reach, size = round(_SHARE * x.shape[-1]), x.shape[-1]
    places = _whole(u[:, :2], 2 * reach + 1)
    x = cut_out(F.pad(x, (reach,) * 4), places[:, 0], places[:, 1], size)
    brightness, saturation, contrast = u[:, 2:, None, None, None].unbind(dim=1)
    x = x + (brightness - 0.5)
    grey = x.mean(dim=1, keepdim=True)
    x = (x - grey) * (2 * saturation) + grey
    mean = x.mean(dim=(1, 2, 3), keepdim=True)
    return (x - mean) * (contrast + 0.5) + mean


def _whole(u: Tensor, count: int) -> Tensor:
    """Uniform numbers in (0, 1) as whole ones from 0 to count - 1."""
    return (u * count).long().clamp(max=count - 1)
