"""How an image is drawn piece after piece, whatever network tells a piece.

    raster    z_n = trunk(pieces before n),  piece n = tell(z_n)               L steps, keys and values are kept
    masked    z = trunk(known pieces),  tell those of the hidden pieces whose turn it is, as masking.hidden_counts says
    guidance  w_n = 1 + (w - 1) n / L with n pieces known once these are told (linear), or w (constant)

A trunk runs on the rows of the null class and, behind them, of the labels where there is guidance; tell then gets both.
Shapes: B images, R = 1 or 2 rows of each, L pieces of F numbers, m of them told at once, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from pixelgen_fast.models.causal_trunk import CausalTrunk
from pixelgen_fast.models.masked_trunk import MaskedTrunk, gather
from pixelgen_fast.models.masking import hidden_counts

GuidanceSchedule = Literal["linear", "constant"]
# (z [R B m, D], places int64 [B, m], share of the pieces that are known then) -> pieces [B, m, F]
Tell = Callable[[Tensor, Tensor, float], Tensor]


def guidance_at(schedule: GuidanceSchedule, guidance: float, known: float) -> float:
    """The guidance of pieces with which a share `known` of an image is known."""
    return guidance if schedule == "constant" else 1 + (guidance - 1) * known


def class_rows(labels: Tensor, guidance: float, null_class: int) -> Tensor:
    """The classes that a trunk runs on: int64 [R B]."""
    return labels if guidance == 1 else torch.cat([torch.full_like(labels, null_class), labels])


def draw_raster(
    trunk: CausalTrunk, y: Tensor, images: int, shape: tuple[int, int], tell: Tell, before_pass: Callable[[], object]
) -> Tensor:
    """Pieces [B, L, F]. y: int64 [R B]. images: B. shape: (L, F)."""
    (length, width), rows = shape, len(y) // images
    past, pieces = trunk.past(len(y)), []
    before_pass()
    z = trunk(trunk.target_position.new_empty(len(y), 0, width), y, past)
    for n in range(length):
        places = torch.full((images, 1), n, device=y.device)
        pieces.append(tell(z.flatten(0, 1), places, (n + 1) / length))
        if n + 1 < length:
            before_pass()
            z = trunk(pieces[-1].to(z.dtype).repeat(rows, 1, 1), None, past)
    return torch.cat(pieces, dim=1)


def draw_masked(
    trunk: MaskedTrunk, y: Tensor, ranks_BL: Tensor, width: int, passes: int, tell: Tell,
    before_pass: Callable[[], object],
) -> Tensor:  # fmt: skip
    """Pieces [B, L, F]. y: int64 [R B]. ranks: those of masking.random_ranks; the highest is told first."""
    (B, L), rows, hidden = ranks_BL.shape, len(y) // len(ranks_BL), ranks_BL.shape[1]
    like = trunk.target_position
    pieces = like.new_zeros(B, L, width, dtype=torch.promote_types(like.dtype, torch.float32))
    for left in hidden_counts(L, passes):
        before_pass()
        mask = ranks_BL < hidden
        z = trunk(pieces.to(like.dtype).repeat(rows, 1, 1), mask.repeat(rows, 1), y, L - hidden)
        turn = (mask & (ranks_BL >= left)).to(torch.uint8)
        places = turn.argsort(dim=1, descending=True, stable=True)[:, : hidden - left]
        told = tell(gather(z, places.repeat(rows, 1)).flatten(0, 1), places, (L - left) / L)
        pieces = pieces.scatter(1, places[..., None].expand_as(told), told.to(pieces.dtype))
        hidden = left
    return pieces
