"""The batches of a step, fetched while the ranks can still agree to end.

A rank that cannot read its images must not simply stop: the others would wait for it in the next step for ever, and
what was trained would be lost. So the batches of the next step are fetched before the ranks ask each other whether to
go on, beside the work of the last one, and an error waits until they have: then all save and end together.
"""

from __future__ import annotations

from pixelgen_fast.data import Batch
from pixelgen_fast.data.dali import Loader
from pixelgen_fast.data.order import Order


class Feed:
    """error: why the next step has no batches on this rank; None while it has."""

    def __init__(self, loader: Loader, order: Order) -> None:
        self.loader, self.order = loader, order
        self.error: Exception | None = None
        self._next = 0
        self._batches: list[Batch] | None = None

    def fetch(self) -> None:
        """Have the batches of the next step at hand, or `error`."""
        try:
            self._batches = self._read()
        except Exception as error:
            self.error = error

    def take(self) -> tuple[list[Batch], list[int]]:
        """The micro-batches of the next step, and the first image number of each. Raises what reading raises."""
        batches = self._batches or self._read()
        self._batches = None
        first = [self.order.first(q) for q in range(self._next, self._next + self.order.accumulation)]
        self._next += self.order.accumulation
        return batches, first

    def reason(self) -> str:
        """Why some rank has no batches, in words."""
        return str(self.error or "another rank cannot read its images, see its message")

    def _read(self) -> list[Batch]:
        return [next(self.loader) for _ in range(self.order.accumulation)]
