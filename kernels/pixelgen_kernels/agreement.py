"""Whether two results agree: one measure, one table of what is tolerated, and no way past it for a NaN.

    error = ||out - ref|| / ||ref||        in float64; infinite where `out` is not finite and `ref` is, or the reverse

Python's max(0.0, nan) is 0.0 and every comparison with NaN is false, so a measure that is folded or compared must be
finite or infinite, never NaN.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor


class Tolerance(NamedTuple):
    """Largest error that is tolerated, and where it comes from."""

    error: float
    reason: str


# Of the error against float64; an operator that is not named has the row "" of the type. The float32 rows are 1.4 to
# 10 times the largest error on a CPU over all bodies and shapes.RAGGED, and over two images at B's sizes.
TOLERANCES: dict[tuple[str, torch.dtype], Tolerance] = {
    ("", torch.float64): Tolerance(1e-14, "a few roundings of 2^-53, sums in another order"),
    ("", torch.float32): Tolerance(
        1e-6, "a few roundings of 2^-24, functions to 2 units in the last place, sums in another order"
    ),
    ("swiglu_linear", torch.float32): Tolerance(2e-6, "sums over the hidden width, and over all rows for the weight"),
    ("attention", torch.float32): Tolerance(2e-6, "sums over the head and over the tokens, an exponential between"),
    ("pixel_mlp", torch.float32): Tolerance(5e-6, "GELU is a polynomial, wrong by 1e-6, and so is its derivative"),
    ("flow_loss", torch.float32): Tolerance(
        1e-5, "gradients of the weights are sums over all pixels of both signs, of which little remains"
    ),
    ("pixel_attention", torch.float32): Tolerance(
        1e-5, "five products in a row, and a softmax whose gradient for the norms of q and k nearly cancels"
    ),
    ("adamw_ema", torch.float32): Tolerance(3e-7, "element by element, nothing is summed"),
    ("", torch.bfloat16): Tolerance(
        2e-3, "one rounding of a float32 result: 2^-8 at most, 1.7e-3 in the mean over many numbers"
    ),
    ("norm_modulate", torch.bfloat16): Tolerance(4e-3, "two roundings: of x', and of what is computed from it"),
    ("noised_patch_projection", torch.bfloat16): Tolerance(4e-3, "two roundings: of the noised image, and of tokens"),
    ("swiglu_linear", torch.bfloat16): Tolerance(4e-3, "two roundings: of silu(a) b, and of its product"),
    ("flow_loss", torch.bfloat16): Tolerance(3e-3, "one rounding, also of a bias of three numbers, too few for a mean"),
    ("pixel_mlp", torch.bfloat16): Tolerance(
        1e-2, "the hidden layer and its gradient are rounded on the way to each of two products"
    ),
    ("attention", torch.bfloat16): Tolerance(1e-2, "probabilities and their gradient are rounded before a product"),
    ("pixel_attention", torch.bfloat16): Tolerance(2e-2, "five products in a row, each rounded"),
}


def tolerance(operator: str, dtype: torch.dtype) -> float:
    """Largest tolerated error of an operator's outputs and gradients of a type; 0 for whole numbers.

    float16 has three bits more than bfloat16; one of them is left to what falls below its normal range of 6e-5.
    Raises KeyError for other types.
    """
    if not (dtype.is_floating_point or dtype.is_complex):
        return 0.0
    finer, row = (4, torch.bfloat16) if dtype == torch.float16 else (1, dtype)
    return TOLERANCES.get((operator, row), TOLERANCES["", row]).error / finer


def relative_error(out: Tensor, ref: Tensor) -> float:
    """The measure above; ||out|| where the reference is all zero or empty. Never NaN.

    Elements that are not finite in both count as equal when they are the same. Raises ValueError for other shapes.
    """
    if out.shape != ref.shape:
        raise ValueError(f"cannot compare {list(out.shape)} with {list(ref.shape)}")
    out, ref = out.detach().double().cpu(), ref.detach().double().cpu()
    finite = torch.isfinite(ref)
    if not torch.equal(torch.isfinite(out), finite) or not torch.allclose(
        out[~finite], ref[~finite], rtol=0.0, atol=0.0, equal_nan=True
    ):
        return math.inf
    out, ref = out[finite], ref[finite]
    norm = float(ref.norm())
    error = float((out - ref).norm()) / (norm if norm > 0 else 1.0)
    # squares of numbers past 1e154 overflow
    return math.inf if math.isnan(error) else error


def worst(errors: Iterable[float]) -> float:
    """The largest, 0 of none. Raises ValueError for a NaN, which `max` would lose."""
    largest = 0.0
    for error in errors:
        if math.isnan(error):
            raise ValueError("an error is NaN: measure it with relative_error, which is never")
        largest = max(largest, error)
    return largest
