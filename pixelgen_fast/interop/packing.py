"""Public weights as parts of native ones, one list for both directions.

native = sign * [public_1; public_2; ...]          rows below one another; kernels of 1 x 1 pixels as matrices
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pixelgen_fast.interop.layout import Shapes, State


@dataclass(frozen=True)
class Packed:
    """A native weight and the public ones {name: shape} that it consists of. sign: -1 where it is their negative."""

    native: str
    public: Shapes
    sign: int = 1


def linear(
    native: str, public: Sequence[str], rows: int, columns: int, kernel: tuple[int, ...] = (), sign: int = 1
) -> list[Packed]:
    """Weight and bias of a layer that stands for the public layers `public` below one another, of `rows` rows each.

    kernel: what follows in the shape of a public weight.
    """
    return [
        Packed(f"{native}.weight", {f"{name}.weight": (rows, columns, *kernel) for name in public}, sign),
        Packed(f"{native}.bias", {f"{name}.bias": (rows,) for name in public}, sign),
    ]


def shapes_of(entries: Iterable[Packed]) -> Shapes:
    """{public name: shape}, in order."""
    return {name: shape for entry in entries for name, shape in entry.public.items()}


def pack(entries: Iterable[Packed], public: State) -> dict[str, Tensor]:
    """Native weights of public ones; differentiable."""
    native = {}
    for entry in entries:
        parts = [public[name].flatten(1) if len(shape) > 2 else public[name] for name, shape in entry.public.items()]
        whole = torch.cat(parts) if len(parts) > 1 else parts[0]
        native[entry.native] = -whole if entry.sign < 0 else whole
    return native


def unpack(entries: Iterable[Packed], native: State) -> dict[str, Tensor]:
    """Public weights of native ones: the inverse of `pack`."""
    public = {}
    for entry in entries:
        whole = -native[entry.native] if entry.sign < 0 else native[entry.native]
        parts = whole.split([shape[0] for shape in entry.public.values()])
        public |= {name: part.reshape(shape) for (name, shape), part in zip(entry.public.items(), parts, strict=True)}
    return public
