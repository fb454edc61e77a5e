"""Who takes which image, and when: a function of (seed, image number), the same for every world and micro-batch.

    micro-batch q of rank r, from image S on, with global batch G, W ranks, micro-batch b and M = G / (W b) a step:
        number(q, j) = S + G (q div M) + r G / W + b (q mod M) + j         0 <= j < b
        index        = permutation(seed, epoch)[number mod N]              epoch = number div N, of N images

Readers, the loader, the trainer's random numbers and the cache of features all ask this file. It imports no torch, so
that a reader process starts quickly.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from pixelgen_fast.errors import InputError


@dataclass(frozen=True)
class Order:
    """The images of one rank of a run that starts, or goes on, at image `start`.

    Raises InputError for numbers that do not fit each other.
    """

    seed: int
    global_batch: int
    micro_batch: int
    rank: int = 0
    world: int = 1
    start: int = 0

    def __post_init__(self) -> None:
        if min(self.global_batch, self.micro_batch, self.world) < 1 or self.start < 0:
            raise InputError(
                f"global_batch {self.global_batch}, micro_batch {self.micro_batch} and world {self.world} must be "
                f"positive, start {self.start} not negative"
            )
        if not 0 <= self.rank < self.world:
            raise InputError(f"rank {self.rank} must lie from 0 to {self.world - 1}, world - 1")
        if self.global_batch % (self.micro_batch * self.world):
            raise InputError(
                f"global_batch {self.global_batch} is not a multiple of micro_batch {self.micro_batch} x {self.world} "
                f"ranks = {self.micro_batch * self.world}: change one of them"
            )

    @property
    def accumulation(self) -> int:
        """Micro-batches of this rank in a step."""
        return self.global_batch // (self.micro_batch * self.world)

    def first(self, batch: int) -> int:
        """The image number at the first place of micro-batch `batch`, counted from the start."""
        step, micro = divmod(batch, self.accumulation)
        share = self.global_batch // self.world
        return self.start + self.global_batch * step + self.rank * share + micro * self.micro_batch

    def numbers(self, batch: int) -> range:
        """The image numbers of micro-batch `batch`."""
        first = self.first(batch)
        return range(first, first + self.micro_batch)


def position(seed: int, number: int, size: int) -> int:
    """Index of image `number` (>= 0) of a run over `size` images: every epoch visits each index once."""
    epoch, offset = divmod(number, size)
    return int(_permutation(seed, epoch, size)[offset])


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    words = np.random.Philox(key=np.array([seed % 2**64, epoch], dtype=np.uint64)).random_raw(size)
    return np.argsort(words, kind="stable")
