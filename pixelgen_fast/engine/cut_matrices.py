"""Whole matrices out of the pieces of flattened parameters that ranks own.

ZeRO 1 and 2 lay the parameters of a group one after another and give each of W ranks an equal slice:

    ranks      |        0        |        1        |
    matrices   [ w0 | w1 |     w2    |   w3  | w4  ]     w2 alone is cut

A slice's end cuts one matrix at most, so nearly all matrices lie whole with one rank, which has nobody to ask. A cut
one goes to the rank that has most of it, and what that rank makes of it comes back: two `all_to_all` a step, of the
smaller parts of at most W - 1 matrices. Of PixelDiT-XL's 214 matrices four ranks cut three and send 3.1 M numbers each
way, 12 MB in bf16 for both ways and all ranks; gathered everywhere, 473 M would go to each, 710 MB.

A parameter may stack several matrices, one over another; each is one here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pixelgen_fast.engine.optimizer import Place


@dataclass(frozen=True, eq=False)
class _Matrix:
    """A matrix of this shape. parts: how many of its elements each rank has; holder, offset: where this rank's are."""

    rows: int
    columns: int
    parts: tuple[int, ...]
    holder: Tensor
    offset: int

    @property
    def owner(self) -> int:
        """The rank that has most of it, the first of them."""
        return self.parts.index(max(self.parts))


class _Message(NamedTuple):
    """A piece of a matrix, of so many elements, that goes to another rank or comes from it."""

    rank: int
    matrix: _Matrix
    size: int


class CutMatrices:
    """The matrices of some parameters over all ranks.

    stacked: {parameter [n rows, columns]: n}, alike on every rank. places: where this rank's pieces of them lie.
    All ranks must build it and call `map_`.
    """

    # of one product: 128 MB in bf16
    LARGEST = 2**26

    def __init__(self, stacked: Mapping[nn.Parameter, int], places: Mapping[nn.Parameter, Place]) -> None:
        together = dist.is_initialized() and dist.get_world_size() > 1
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)
        pieces = [places[parameter] for parameter in stacked]
        matrices = list(_matrices(stacked, pieces, self._spans(pieces), self.rank))
        self._own = [m for m in matrices if m.owner == self.rank]
        lent = [_Message(m.owner, m, m.parts[self.rank]) for m in matrices if m.owner != self.rank]
        self._lent = sorted((x for x in lent if x.size), key=lambda x: x.rank)
        others = [r for r in range(self.world) if r != self.rank]
        self._borrowed = [_Message(r, m, m.parts[r]) for r in others for m in self._own if m.parts[r]]
        # of all ranks: what one way of the exchange moves
        self.exchanged = sum(sum(m.parts) - max(m.parts) for m in matrices)

    def _spans(self, pieces: list[Place]) -> list[list[tuple[int, int]]]:
        """(start, length) of each parameter's piece on each rank."""
        own = torch.tensor([(piece.start, piece.length) for piece in pieces], device=pieces[0].holder.device)
        if self.world == 1:
            return [[(piece.start, piece.length)] for piece in pieces]
        of_ranks = [torch.empty_like(own) for _ in range(self.world)]
        dist.all_gather(of_ranks, own)
        return [[(s, n) for s, n in of_parameter] for of_parameter in torch.stack(of_ranks, dim=1).tolist()]

    def map_(self, flat: Mapping[Tensor, Tensor], function: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
        """Replace every matrix X in place by function(X).

        flat: a tensor [n] for each holder. function: from [k, rows, columns] of `dtype` to the same, X by X. It is
        called once for each matrix, on one rank.
        """

        def own(m: _Matrix) -> Tensor:
            return flat[m.holder][m.offset : m.offset + m.parts[self.rank]]

        none = next(iter(flat.values())).new_empty(0, dtype=dtype)
        lent = [own(message.matrix) for message in self._lent]
        came = self._swap([x.to(dtype) for x in lent], self._lent, self._borrowed, none)
        there = {(message.rank, message.matrix): x for message, x in zip(self._borrowed, came, strict=True)}
        for batch in self._batches():
            pieces = [
                [there[r, m] if (r, m) in there else own(m) for r in range(self.world) if m.parts[r]] for m in batch
            ]
            stack = torch.stack([torch.cat([x.to(dtype) for x in of_one]) for of_one in pieces])
            results = function(stack.unflatten(1, (batch[0].rows, batch[0].columns))).flatten(1)
            for of_one, result in zip(pieces, results, strict=True):
                for piece, new in zip(of_one, result.split([x.numel() for x in of_one]), strict=True):
                    piece.copy_(new)
        back = self._swap(came, self._borrowed, self._lent, none)
        for piece, new in zip(lent, back, strict=True):
            piece.copy_(new)

    def _swap(
        self, pieces: Sequence[Tensor], sent: list[_Message], received: list[_Message], none: Tensor
    ) -> Sequence[Tensor]:
        """Send pieces, one for each message, and give those that come. Both are in the order of ranks."""
        if not self.exchanged:
            return []
        sizes_out, sizes_in = (
            [sum(x.size for x in messages if x.rank == r) for r in range(self.world)] for messages in (sent, received)
        )
        incoming = none.new_empty(sum(sizes_in))
        dist.all_to_all_single(incoming, torch.cat([none, *pieces]), sizes_in, sizes_out)
        return incoming.split([message.size for message in received])

    def _batches(self) -> Iterator[list[_Matrix]]:
        """This rank's matrices, those of one shape together."""
        by_shape: dict[tuple[int, int], list[_Matrix]] = {}
        for m in self._own:
            by_shape.setdefault((m.rows, m.columns), []).append(m)
        for (rows, columns), alike in by_shape.items():
            size = max(1, self.LARGEST // (rows * columns))
            yield from (alike[i : i + size] for i in range(0, len(alike), size))


def _matrices(
    stacked: Mapping[nn.Parameter, int], pieces: list[Place], spans: list[list[tuple[int, int]]], rank: int
) -> Iterator[_Matrix]:
    for (parameter, count), piece, of_ranks in zip(stacked.items(), pieces, spans, strict=True):
        rows, columns = parameter.shape[0] // count, parameter.shape[1]
        for number in range(count):
            begin, end = number * rows * columns, (number + 1) * rows * columns
            parts = tuple(max(0, min(end, start + n) - max(begin, start)) for start, n in of_ranks)
            if sum(parts) != end - begin:
                raise ValueError(
                    f"the ranks have {sum(parts)} of the {end - begin} elements of a matrix {rows, columns}"
                )
            yield _Matrix(rows, columns, parts, piece.holder, piece.offset + max(begin - piece.start, 0))
