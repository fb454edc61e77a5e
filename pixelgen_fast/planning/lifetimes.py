"""When the tensors of a step live, on the meta device: what forward keeps for backward, and the most there is at once.

operation     1   2   3 | 4   5            clock
a             o---------------x            made by operation 1, freed when 5 is done
b                 o-------x
kept = what lives at the bar, peak = the largest sum at any time, gradients of parameters left out of both
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from pixelgen_fast.engine.plan import Allocations, storages

SMALL = 1 << 16  # bytes of a storage that is not worth following
EVERY = 4  # operations after which it is looked up what has been freed


@dataclass
class Life:
    """A storage: its bytes, the part that made it, and when. died: None while it lives."""

    ref: StorageWeakRef
    bytes: int
    part: str
    born: int
    died: int | None = None


class Lifetimes(Allocations):
    """Follows every storage that an operation makes. part: told at each operation, which part of the model runs."""

    def __init__(self, known: Iterable[Tensor], part: Callable[[], str]) -> None:
        super().__init__(known)
        self.part, self.clock = part, 0
        self.living: dict[int, Life] = {}
        self.lives: list[Life] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        self.clock += 1
        for storage in storages(out):
            if storage._cdata in self.known or storage.nbytes() < SMALL:
                continue
            before = self.living.get(storage._cdata)
            if before is not None and not before.ref.expired():
                continue
            if before is not None:
                before.died = self.clock
            life = Life(StorageWeakRef(storage), storage.nbytes(), self.part(), self.clock)
            self.living[storage._cdata] = life
            self.lives.append(life)
        if self.clock % EVERY == 0:
            self._bury()
        return out

    def _bury(self) -> None:
        for key in [key for key, life in self.living.items() if life.ref.expired()]:
            self.living.pop(key).died = self.clock

    def kept(self) -> dict[str, int]:
        """Bytes that live now, by the part that made them."""
        self._bury()
        found: dict[str, int] = defaultdict(int)
        for life in self.living.values():
            found[life.part] += life.bytes
        return dict(found)

    def peak(self, without: Iterable[Tensor]) -> int:
        """The most bytes that lived at once, those of some tensors left out."""
        left_out = {storage._cdata for storage in storages(list(without))}
        out = {id(self.living[key]) for key in left_out if key in self.living}
        change = [0] * (self.clock + 2)
        for life in self.lives:
            if id(life) not in out:
                change[life.born] += life.bytes
                change[self.clock + 1 if life.died is None else life.died] -= life.bytes
        most = now = 0
        for step in change:
            now += step
            most = max(most, now)
        return most
