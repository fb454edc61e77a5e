"""Whole matrices out of the pieces of flattened parameters that ranks own.

ZeRO 1 and 2 lay the parameters of a group one after another and give each of W ranks an equal slice:

    ranks      |        0        |        1        |
    matrices   [ w0 | w1 |     w2    |   w3  | w4  ]     w2 alone is cut

A slice's end cuts one matrix at most, so nearly all matrices lie whole with one rank, which has nobody to ask. A cut
one goes to the rank that has most of it, and what that rank makes of it comes back: two `all_to_all` a step, of the
smaller parts of at most W - 1 matrices, where gathering everything everywhere would move all matrices to W - 1 ranks.

A parameter may stack several matrices, one over another; each is one here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise

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
        self._lent = [[m for m in matrices if m.owner == r != self.rank and m.parts[self.rank]] for r in self._ranks]
        self._borrowed = [[m for m in self._own if r != self.rank and m.parts[r]] for r in self._ranks]
        # of all ranks: what one way of the exchange moves
        self.exchanged = sum(sum(m.parts) - max(m.parts) for m in matrices)

    @property
    def _ranks(self) -> range:
        return range(self.world)

    def _spans(self, pieces: list[Place]) -> list[list[tuple[int, int]]]:
        """(start, length) of each parameter's piece on each rank."""
        own = torch.tensor([(piece.start, piece.length) for piece in pieces], device=pieces[0].holder.device)
        if self.world == 1:
            return [[(piece.start, piece.length)] for piece in pieces]
        of_ranks = [torch.empty_like(own) for _ in self._ranks]
        dist.all_gather(of_ranks, own)
        return [[(s, n) for s, n in of_parameter] for of_parameter in torch.stack(of_ranks, dim=1).tolist()]

    def map_(self, flat: Mapping[Tensor, Tensor], function: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
        """Replace every matrix X in place by function(X).

        flat: a tensor [n] for each holder. function: from [k, rows, columns] of `dtype` to the same, X by X. It is
        called once for each matrix, on one rank.
        """

        def part(m: _Matrix) -> Tensor:
            return flat[m.holder][m.offset : m.offset + m.parts[self.rank]]

        lent = [part(m) for to_rank in self._lent for m in to_rank]
        like = next(iter(flat.values()))
        borrowed = self._exchange([x.to(dtype) for x in lent], self._lent, self._borrowed, like, dtype)
        there = {(r, m): x for r, m, x in borrowed}
        for batch in self._batches():
            pieces = [[part(m) if r == self.rank else there[r, m] for r in self._ranks if m.parts[r]] for m in batch]
            whole = [torch.cat([x.to(dtype) for x in of_one]) if len(of_one) > 1 else of_one[0] for of_one in pieces]
            stack = torch.stack([x.to(dtype) for x in whole]).unflatten(1, (batch[0].rows, batch[0].columns))
            for of_one, result in zip(pieces, function(stack).flatten(1), strict=True):
                for piece, new in zip(of_one, result.split([x.numel() for x in of_one]), strict=True):
                    piece.copy_(new)
        back = self._exchange([x for *_, x in borrowed], self._borrowed, self._lent, like, dtype)
        for piece, (*_, new) in zip(lent, back, strict=True):
            piece.copy_(new)

    def _exchange(
        self,
        pieces: list[Tensor],
        sent: list[list[_Matrix]],
        received: list[list[_Matrix]],
        like: Tensor,
        dtype: torch.dtype,
    ) -> list[tuple[int, _Matrix, Tensor]]:
        """Send pieces, by rank in the order of `sent`; returns (rank, matrix, piece) in the order of `received`.

        A matrix that this rank owns has the other's piece on the way, one that it does not own has its own.
        """
        if not self.exchanged:
            return []
        there = [(r, m, m.parts[r if m.owner == self.rank else self.rank]) for r in self._ranks for m in received[r]]
        sizes_in = [sum(n for rank, _, n in there if rank == r) for r in self._ranks]
        ends = list(accumulate((len(of_rank) for of_rank in sent), initial=0))
        sizes_out = [sum(x.numel() for x in pieces[a:b]) for a, b in pairwise(ends)]
        outgoing = torch.cat(pieces) if pieces else like.new_empty(0, dtype=dtype)
        incoming = like.new_empty(sum(sizes_in), dtype=dtype)
        dist.all_to_all_single(incoming, outgoing, sizes_in, sizes_out)
        split = incoming.split([n for *_, n in there])
        return [(r, m, x) for (r, m, _), x in zip(there, split, strict=True)]

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
