"""Who takes which image, and when: a function of (seed, image number), the same for every world and micro-batch.

    micro-batch q of rank r, from image S on, with global batch G, W ranks, micro-batch b and M = G / (W b) a step:
        number(q, j) = S + G (q div M) + r G / W + b (q mod M) + j         0 <= j < b
        index        = permutation(seed, epoch)[number mod N]              epoch = number div N, of N images

The permutation is computed at the places that are asked for, never as a table: an alternating Feistel network over the
smallest power of two that holds N, walked along its cycle while it leads outside [0, N) (Black and Rogaway, "Ciphers
with Arbitrary Finite Domains", 2002). With x = (L, R) as bit strings, round r of 24 is
    L ^= mix(R gamma + key_r), and in odd rounds R ^= mix(L gamma + key_r)
with SplitMix64's mix and gamma, and 64-bit keys that a Philox generator draws from (seed, epoch). So a run starts
anywhere in the same time, at 100 million images as at 100, and keeps no table: 64 places take about 1 ms on one core.

Readers, the loader, the trainer's random numbers and the cache of features all ask this file. It imports no torch, so
that a reader process starts quickly.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from pixelgen_fast.errors import InputError

# what a checkpoint keeps of the rule; another rule has another name
RULE = "Feistel network, 24 rounds of SplitMix64, keys of Philox"

_ROUNDS = 24
_SUBSTITUTES = 2**63
_TRIED_AT_ONCE = 16
_GAMMA = np.uint64(0x9E3779B97F4A7C15)


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


def positions(seed: int, numbers: Iterable[int], size: int) -> np.ndarray:
    """Indexes int64 [n] of n image numbers (>= 0) of a run over `size` images: every epoch visits each index once.

    Which image has which number is fixed by (seed, size) alone, on every machine and for every version of numpy.
    """
    epochs, places = np.divmod(np.asarray([*numbers], dtype=np.int64), size)
    indexes = np.empty_like(places)
    for epoch in np.unique(epochs).tolist():
        chosen = epochs == epoch
        indexes[chosen] = permuted(_keys(seed, epoch), places[chosen], size)
    return indexes


def position(seed: int, number: int, size: int) -> int:
    """Index of one image number: `positions` of several costs little more."""
    return int(positions(seed, [number], size)[0])


def substitutes(seed: int, number: int, size: int) -> Iterator[int]:
    """Indexes to try in place of image `number` where it cannot be read: each of them once, in an order of its own.

    So what cannot be read falls to images all over the data set, others in every epoch, the same on every rank.
    """
    keys = round_keys(seed, _SUBSTITUTES + number)
    for begin in range(0, size, _TRIED_AT_ONCE):
        yield from permuted(keys, np.arange(begin, min(begin + _TRIED_AT_ONCE, size)), size).tolist()


def permuted(keys: tuple[int, ...], places: np.ndarray, size: int) -> np.ndarray:
    """Where a permutation of [0, size) takes `places`, int64 [n]; keys, one a round, choose the permutation."""
    bits = max(1, (size - 1).bit_length())
    values = _feistel(keys, places.astype(np.uint64), bits)
    while (outside := np.flatnonzero(values >= size)).size:
        values[outside] = _feistel(keys, values[outside], bits)
    return values.astype(np.int64)


def _feistel(keys: tuple[int, ...], values: np.ndarray, bits: int) -> np.ndarray:
    """A bijection of the numbers of `bits` bits, uint64 [n] to uint64 [n]."""
    low_bits = bits // 2
    widths = (np.uint64(2 ** (bits - low_bits) - 1), np.uint64(2**low_bits - 1))
    halves = [values >> np.uint64(low_bits), values & widths[1]]
    for r, key in enumerate(keys):
        changed, other = r % 2, 1 - r % 2
        halves[changed] = halves[changed] ^ (_mix(halves[other] * _GAMMA + np.uint64(key)) & widths[changed])
    return halves[0] << np.uint64(low_bits) | halves[1]


def _mix(z: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele, Lea and Flood, 2014; Stafford's variant 13), on uint64."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@lru_cache(maxsize=4)
def _keys(seed: int, epoch: int) -> tuple[int, ...]:
    return round_keys(seed, epoch)


def round_keys(seed: int, counter: int) -> tuple[int, ...]:
    """The keys of one permutation of a run. counter: 0 to 2^64 - 1; epochs count from 0, substitutes from 2^63."""
    words = np.random.Philox(key=np.array([seed % 2**64, counter], dtype=np.uint64)).random_raw(_ROUNDS)
    return tuple(words.tolist())
