"""From files to batches of uint8 images, as a pure function of the image number."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:  # reader processes import this package and need no torch
    from torch import Tensor


class Batch(NamedTuple):
    """One micro-batch. images: uint8 [b, H, W, 3]; labels: int64 [b]; numbers: int64 [b], each image's number."""

    images: Tensor
    labels: Tensor
    numbers: Tensor
