"""The learning rate as a function of the images seen.

warm-up   lr n / warmup for n < warmup
cosine    lr (1 + cos(pi (n - warmup) / (total - warmup))) / 2
stepped   the rate of the last drop that is not ahead
"""

from __future__ import annotations

import math

from pixelgen_fast.config import Optimizer


def learning_rate(optimizer: Optimizer, nimg: int, total: int) -> float:
    """Rate of the step that begins at image `nimg` of a run of `total` images."""
    if nimg < optimizer.warmup_images:
        return optimizer.lr * nimg / optimizer.warmup_images
    if optimizer.schedule == "cosine":
        progress = (nimg - optimizer.warmup_images) / (total - optimizer.warmup_images)
        return optimizer.lr * 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))
    passed = [drop.lr for drop in optimizer.drops if drop.at_images <= nimg]
    return passed[-1] if passed else optimizer.lr
