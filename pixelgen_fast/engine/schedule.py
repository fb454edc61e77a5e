"""The learning rate as a function of the images seen.

warm-up   lr n / warmup for n < warmup
cosine    lr (1 + cos(pi (n - warmup) / (total - warmup))) / 2
stepped   the rate of the last drop that is not ahead
linear    straight from each drop to the next; before the first one the rate is lr, behind the last one its own
"""

from __future__ import annotations

import math

from pixelgen_fast.optimizer import Optimizer


def learning_rate(optimizer: Optimizer, nimg: int, total: int) -> float:
    """Rate of the step that begins at image `nimg` of a run of `total` images."""
    if nimg < optimizer.warmup_images:
        return optimizer.lr * nimg / optimizer.warmup_images
    if optimizer.schedule == "cosine":
        progress = (nimg - optimizer.warmup_images) / (total - optimizer.warmup_images)
        return optimizer.lr * 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))
    passed = [drop for drop in optimizer.drops if drop.at_images <= nimg]
    if optimizer.schedule == "linear" and 0 < len(passed) < len(optimizer.drops):
        begin, end = passed[-1], optimizer.drops[len(passed)]
        share = (nimg - begin.at_images) / (end.at_images - begin.at_images)
        return begin.lr + share * (end.lr - begin.lr)
    return passed[-1].lr if passed else optimizer.lr
