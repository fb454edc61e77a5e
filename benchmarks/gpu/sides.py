"""Do the sides of a training step agree? The same model on the same images must give the same numbers.

    loss, gradient norm      |a - b| / |b|                              of the first steps, b the reference's
    gradients                |a_p - b_p| / (|b_p| + FLOOR |b|)          the norm of each parameter's, in the first step

A step in which a kernel is wrong shows in the gradient that it makes, however small that is beside the others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# options that change what is kept and when, and no number
NEUTRAL = ("train.", "model.pixel_attention_save=")
PYTORCH = "PyTorch SDPA"
FLOOR = 1e-7  # gradients that are smaller than this share of all are noise; those of a block are a thousandth


@dataclass(frozen=True)
class Tolerance:
    """Largest differences that rounding makes, by type of the weights."""

    loss: float
    norm: float
    gradient: float


TOLERANCES = {
    # sums in another order
    "cpu": Tolerance(1e-5, 1e-5, 1e-5),
    # activations and gradients rounded to bfloat16 in other places; between bfloat16 and float32 the reference's own
    # numbers were apart by 2e-5, 1e-3 and 9e-3 at most in models of 12 and 24 blocks
    "cuda": Tolerance(5e-4, 1e-2, 5e-2),
}


@dataclass(frozen=True)
class Comparison:
    """Two steps and their largest differences. worst: the parameter whose gradient differs most."""

    name: str
    against: str
    loss: float
    norm: float
    gradient: float
    worst: str
    red: bool


def name_of(row: Mapping[str, Any]) -> str:
    """How a step is called in tables: "pixeldit_xl_256 ours 64 recompute=operators"."""
    words = [row["config"], row["side"], str(row["images"])]
    words += [text.split(".")[1] for text in row["overrides"] if text.startswith(NEUTRAL)]
    if others := [text for text in row["overrides"] if not text.startswith(NEUTRAL)]:
        words.append(f"({len(others)} options of the model)")
    if PYTORCH not in row["attention"]:
        words.append(row["attention"].removeprefix("attention: ").split(" on ")[0])
    return " ".join(words)


def compare(rows: Sequence[Mapping[str, Any]], device: str) -> list[Comparison]:
    """Every step beside the reference of the same model and images, or where there is none beside ours as it is.

    Options of training change no number; options of the model make it another one.
    """
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        model = tuple(text for text in row["overrides"] if not text.startswith(NEUTRAL))
        groups.setdefault((row["config"], row["images"], model), []).append(row)
    found = []
    for group in groups.values():
        by_side = sorted(group, key=lambda row: (row["side"] != "reference", row["side"] != "ours", name_of(row)))
        found += [_compare(row, by_side[0], TOLERANCES[device]) for row in by_side[1:]]
    return found


def _compare(row: Mapping[str, Any], other: Mapping[str, Any], tolerated: Tolerance) -> Comparison:
    loss = max(_difference(a, b) for a, b in zip(row["losses"], other["losses"], strict=True))
    norm = max(_difference(a, b) for a, b in zip(row["gradient_norms"], other["gradient_norms"], strict=True))
    gradients, floor = other["by_parameter"], FLOOR * other["gradient_norms"][0]
    apart = {name: _difference(row["by_parameter"].get(name, math.nan), b, floor) for name, b in gradients.items()}
    worst = max(apart, key=lambda name: apart[name])
    red = loss > tolerated.loss or norm > tolerated.norm or apart[worst] > tolerated.gradient
    red |= row["by_parameter"].keys() != gradients.keys()
    return Comparison(name_of(row), name_of(other), loss, norm, apart[worst], worst, red)


def _difference(a: float, b: float, floor: float = 0.0) -> float:
    """Infinite where one is not finite: a NaN would pass every comparison."""
    difference = abs(a - b) / (abs(b) + floor) if b or floor else abs(a - b)
    return difference if math.isfinite(difference) else math.inf
