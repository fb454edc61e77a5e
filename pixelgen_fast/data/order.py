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

Readers, the loader, the trainer's random numbers and the cache of features all ask this file or sampler.py, whose order
of balanced classes is made of the same permutations. It imports no torch, so that a reader process starts quickly.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from pixelgen_fast.errors import InputError

# what a checkpoint keeps of the rule; another rule has another name
RULE = "Feistel network, 24 rounds of SplitMix64, keys of Philox"

ROUNDS = 24
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
    yield from tried(substitute_keys(seed, number), size)  # drawn only where they are asked for


def substitute_keys(seed: int, number: int) -> tuple[int, ...]:
    return round_keys(seed, _SUBSTITUTES + number)


def tried(keys: tuple[int, ...], size: int) -> Iterator[int]:
    """A permutation of [0, size), a few numbers at a time."""
    for begin in range(0, size, _TRIED_AT_ONCE):
        yield from permuted(keys, np.arange(begin, min(begin + _TRIED_AT_ONCE, size)), size).tolist()


def permuted(keys: tuple[int, ...] | np.ndarray, places: np.ndarray, size: int | np.ndarray) -> np.ndarray:
    """Where permutations take `places`, int64 [n]: one of [0, size), which keys, one a round, choose; or for each place
    one of its own, with keys uint64 [rounds, n] and sizes int64 [n]."""
    keys = np.asarray(keys, dtype=np.uint64).reshape(ROUNDS, -1)
    sizes = np.broadcast_to(np.asarray(size, dtype=np.uint64), places.shape)
    bits = np.maximum(1, np.frexp((sizes - np.uint64(1)).astype(np.float64))[1])  # of size - 1, exact below 2^53
    values = _feistel(keys, places.astype(np.uint64), bits)
    while (outside := np.flatnonzero(values >= sizes)).size:
        own = keys if keys.shape[1] == 1 else keys[:, outside]
        values[outside] = _feistel(own, values[outside], bits[outside])
    return values.astype(np.int64)


def _feistel(keys: np.ndarray, values: np.ndarray, bits: np.ndarray) -> np.ndarray:
    """Bijections of the numbers of `bits` bits, uint64 [n] to uint64 [n]; keys uint64 [rounds, n or 1], bits [n]."""
    high_bits, low_bits = (part.astype(np.uint64) for part in (bits - bits // 2, bits // 2))
    one = np.uint64(1)
    widths = ((one << high_bits) - one, (one << low_bits) - one)
    halves = [values >> low_bits, values & widths[1]]
    for r, key in enumerate(keys):
        changed, other = r % 2, 1 - r % 2
        halves[changed] = halves[changed] ^ (_mix(halves[other] * _GAMMA + key) & widths[changed])
    return halves[0] << low_bits | halves[1]


def _mix(z: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele, Lea and Flood, 2014; Stafford's variant 13), on uint64."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@lru_cache(maxsize=4)
def _keys(seed: int, epoch: int) -> tuple[int, ...]:
    return round_keys(seed, epoch)


def round_keys(seed: int, counter: int, stream: tuple[int, int] = (0, 0)) -> tuple[int, ...]:
    """The keys of one permutation of a run. counter: 0 to 2^64 - 1; epochs count from 0, substitutes from 2^63; other
    permutations have streams of their own, two such numbers."""
    key = np.array([seed % 2**64, counter], dtype=np.uint64)
    words = np.random.Philox(key=key, counter=np.array([0, 0, *stream], dtype=np.uint64)).random_raw(ROUNDS)
    return tuple(words.tolist())
