"""What an image draws in training: its time, whether its label is dropped, and its noise.

    t = sigmoid(mean + std n) or t = u;    then t <- t / (t + (1-t) shift);    label <- null where u' < probability

with n standard normal and u, u' uniform, each from its own Philox stream. Where t has a least value, both are drawn
given that t is not below it. All are functions of (seed, image number), so
a resumed run, another world size or another micro-batch draws the same numbers. Logit-normal times are those of
Esser et al., arXiv 2403.03206, section 3.1; a shift above 1 pushes times to noise (t=0), as larger images need.

Shapes: B images; numbers [B] are image numbers (int64) and decide the device of what is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

import torch
from pixelgen_kernels import philox
from torch import Tensor

from pixelgen_fast.settings import TimeKind

Time = TypeVar("Time", float, Tensor)


def shift_time(t: Time, shift: float) -> Time:
    """Shifted time t / (t + (1-t) shift): keeps 0 and 1, and is the identity for shift 1, bit for bit.

    t: a number or tensor in [0, 1]. Raises ValueError unless shift > 0.
    """
    if not (shift > 0 and math.isfinite(shift)):
        raise ValueError(f"time shift must be a positive number, got {shift}; 1 changes nothing, above 1 adds noise")
    return t / (t + (1 - t) * shift)


def sample_times(
    seed: int,
    numbers: Tensor,
    kind: TimeKind = "logit_normal",
    mean: float = 0.0,
    std: float = 1.0,
    shift: float = 1.0,
    count: int | None = None,
    least: float = 0.0,
) -> Tensor:
    """Training time of each image, or `count` of them.

    numbers: int64 [B]. mean, std: of logit(t) before the shift; used by logit_normal only. least: the least t, before
    the shift.
    Returns float32 [B], or [B, count], in [0, 1]; the first of several is the one that an image has alone.
    Raises ValueError for an unknown kind, a negative std, a non-positive shift or a least time outside [0, 1).
    """
    if not 0 <= least < 1:
        raise ValueError(f"the least time must be in [0, 1), got {least}")
    if kind == "uniform":
        t = least + (1 - least) * philox.uniform(seed, numbers, philox.TIME, count or 1).double()
    elif kind == "logit_normal" and least > 0:
        t = truncated_logit_normal(philox.uniform(seed, numbers, philox.TIME, count or 1).double(), least, mean, std)
    elif kind == "logit_normal":
        if not std >= 0:
            raise ValueError(f"the standard deviation of logit(t) must be 0 or more, got {std}")
        # In float64, because PyTorch's float32 sigmoid rounds by a number's place in the batch (vector body or tail).
        t = torch.sigmoid(mean + std * philox.normal(seed, numbers, philox.TIME, count or 1).double())
    else:
        raise ValueError(f"time sampling {kind!r} is unknown; use 'logit_normal' or 'uniform'")
    t = shift_time(t, shift).float()
    return t[:, 0] if count is None else t


def truncated_logit_normal(u: Tensor, least: float, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """The quantiles u of t = sigmoid(mean + std n), n standard normal, given that t is not below `least`.

    u: in (0, 1), float64. Returns the same shape, float64. Raises ValueError for a std that is not above 0.
    """
    if not std > 0:
        raise ValueError(f"the standard deviation of logit(t) must be above 0 where t has a least value, got {std}")
    below = torch.special.ndtr((torch.logit(u.new_tensor(least)) - mean) / std)
    return torch.sigmoid(mean + std * torch.special.ndtri(below + (1 - below) * u))


def drop_labels(seed: int, numbers: Tensor, labels: Tensor, probability: float, null: int) -> Tensor:
    """Labels in which each image's is replaced by the null class with the given probability.

    numbers, labels: int64 [B]. probability: in [0, 1]; 0 drops none and 1 drops all. null: the null class id.
    Returns int64 [B]. Raises ValueError for a probability outside [0, 1].
    """
    if not 0 <= probability <= 1:
        raise ValueError(f"label drop probability must be in [0, 1], got {probability}")
    return labels.masked_fill(chosen(seed, numbers, probability, philox.LABEL_DROP), null)


def chosen(seed: int, numbers: Tensor, probability: float, stream: int) -> Tensor:
    """Which images an event of this probability befalls: bool [B], a function of (seed, image number, stream)."""
    return philox.uniform(seed, numbers, stream, 1)[:, 0] < probability


def noise(seed: int, numbers: Tensor, shape: Sequence[int], stream: int = philox.NOISE) -> Tensor:
    """Standard normal noise of each image.

    numbers: int64 [B]. shape: of one image, (3, H, W); element i of the stream is element i of its row-major order.
    stream: philox.NOISE in training, philox.SAMPLING for the start of a sample. Returns float32 [B, *shape].
    """
    return philox.normal(seed, numbers, stream, math.prod(shape)).reshape(-1, *shape)
