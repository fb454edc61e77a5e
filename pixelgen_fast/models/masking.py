"""Which pieces of an image are hidden: at random in training, and fewer with every pass when one is drawn (MAR).

    training    the first ceil(L r) pieces of a random order, r normal around 1 with deviation 0.25, cut to [low, 1]
    drawing     after pass s of S the first max(1, min(before - 1, floor(L cos(pi s / 2 S)))) of it, after the last none

MAR (arXiv 2406.11838), the schedule from MaskGIT (arXiv 2202.04200). Orders and shares are functions of
(seed, image number), so that the count of an image, unlike in the public code, is its own and not its batch's.
Shapes: B images of L pieces.
"""

from __future__ import annotations

import math

import torch
from pixelgen_kernels import philox
from torch import Tensor

DEVIATION = 0.25


def random_ranks(seed: int, numbers: Tensor, length: int) -> Tensor:
    """The place of each piece in a random order of its image: int64 [B, L]."""
    words = philox.words(seed, numbers, philox.MASK_ORDER, length)
    return words.argsort(dim=1, stable=True).argsort(dim=1)


def hidden_share(u: Tensor, low: float) -> Tensor:
    """The number of [low, 1] whose probability to be above the share that training hides is 1 - u; float64, as u."""
    below = 0.5 + 0.5 * math.erf((low - 1) / DEVIATION / math.sqrt(2))
    return 1 + DEVIATION * torch.special.ndtri(below + u.double() * (0.5 - below))


def training_mask(seed: int, numbers: Tensor, length: int, low: float) -> Tensor:
    """Which pieces training hides: bool [B, L], between ceil(L low) and L of each image."""
    share_B = hidden_share(philox.uniform(seed, numbers, philox.MASK_RATIO, 1)[:, 0], low)
    count_B = torch.ceil(length * share_B).clamp(length - most_known(length, low), length)
    return random_ranks(seed, numbers, length) < count_B[:, None]


def most_known(length: int, low: float) -> int:
    """The most pieces of an image that training shows."""
    return length - math.ceil(length * low)


def hidden_counts(length: int, passes: int) -> list[int]:
    """How many pieces of an image are still hidden after each of min(length, passes) passes; the last number is 0."""
    passes, now, counts = min(length, passes), length, []
    for done in range(1, passes):
        now = max(1, min(now - 1, math.floor(length * math.cos(math.pi / 2 * done / passes))))
        counts.append(now)
    return [*counts, 0]
