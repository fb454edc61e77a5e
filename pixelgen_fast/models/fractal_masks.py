"""What each crop of a fractal draws at random: functions of (seed, image number, place in the image).

Every level has one table with a row for each crop that an image could have, of which a pass reads those that it meets;
so a crop's mask does not depend on which of its neighbours go down, nor on what else is in the batch.
Shapes: B images, M crops of a level among all B crops of the batch, L patches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from pixelgen_kernels import philox
from torch import Tensor

from pixelgen_fast.models.masking import DEVIATION, hidden_share


def by_crop(x_BN: Tensor, sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Numbers of each image in tables: for each (crops, n) one of [B crops, n], in the order of image and crop."""
    parts = x_BN.split([crops * n for crops, n in sizes], dim=1)
    return [part.reshape(-1, n) for part, (_, n) in zip(parts, sizes, strict=True)]


def orders(seed: int, numbers: Tensor, lengths: Sequence[int]) -> list[Tensor]:
    """Random words [B crops, L] of each level, whose order is that of the patches of a crop. lengths: L of each."""
    sizes = [(crops, length) for crops, length in zip(crop_counts(lengths), lengths, strict=False)]
    return by_crop(philox.words(seed, numbers, philox.MASK_ORDER, sum(c * n for c, n in sizes)), sizes)


def crop_counts(lengths: Sequence[int]) -> list[int]:
    """How many crops an image has on each level, and at last how many pixels."""
    return [math.prod(lengths[:depth]) for depth in range(len(lengths) + 1)]


class Masks:
    """The masks of training images. numbers: int64 [B].

    shared: instead of training's share, one of a number of patches uniform in 1..L, the same for all crops of an image
    and level.
    """

    def __init__(self, seed: int, numbers: Tensor, lengths: Sequence[int], shared: bool = False) -> None:
        self.lengths, self.crops, self.shared = lengths, crop_counts(lengths), shared
        self.words = orders(seed, numbers, lengths)
        sizes = [(crops, 1) for crops in self.crops[:-1]]
        self.shares = by_crop(philox.uniform(seed, numbers, philox.MASK_RATIO, sum(c for c, _ in sizes)), sizes)

    def __call__(self, depth: int, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Of the crops `rows`, int64 [M]: bool [M, L], true where hidden, and the places among M L that are."""
        length, crops, shares = self.lengths[depth], self.crops[depth], self.shares[depth][:, 0]
        if self.shared:
            count = 1 + (length * shares[rows // crops * crops]).floor()
        else:
            count = (length * hidden_share(shares[rows], 0.0)).ceil()
        ranks = self.words[depth][rows].argsort(dim=1, stable=True).argsort(dim=1)
        masked = ranks < count[:, None]
        return masked, masked.flatten().nonzero()[:, 0]


def mean_hidden(length: int) -> float:
    """The mean of ceil(L r), r a share that training hides: the sum over k < L of P(L r > k)."""
    low, *below = (_normal_cdf((k / length - 1) / DEVIATION) for k in (0, *range(length)))
    return sum((0.5 - b) / (0.5 - low) for b in below)


def _normal_cdf(x: float) -> float:
    return math.erfc(-x / math.sqrt(2)) / 2


def mean_masks(depth_length: int, rows: Tensor) -> tuple[Tensor, Tensor]:
    """As many patches of each crop as are hidden on average, always the first: masks that need nothing but shapes."""
    count = round(mean_hidden(depth_length))
    masked = torch.arange(depth_length, device=rows.device) < count
    first = torch.arange(len(rows), device=rows.device)[:, None] * depth_length
    return masked.expand(len(rows), -1), (first + torch.arange(count, device=rows.device)).flatten()
