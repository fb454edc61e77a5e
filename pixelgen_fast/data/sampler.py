"""Which image of an index has which number: all images equally often, or all classes (data.class_balanced).

UniformSampler          epoch e = n div N shows every image once, in a permutation of its own
ClassBalancedSampler    round r = n div K shows every class once, in a permutation of its own, and of class c, which has
                        n_c images, the one that stands at r mod n_c in the permutation of lap r div n_c

N images, K classes that have any. After any number of images the classes' counts differ by one at most, and of one
class no image comes again before all others of it have. An epoch is still N images: in it each image of a class of n_c
is shown N / (K n_c) times on average. Both are functions of (seed, number) alone, found anywhere in the same time
(order.py), so a run goes on anywhere, on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Protocol

import numpy as np

from pixelgen_fast.data.image_index import ImageIndex
from pixelgen_fast.data.order import ROUNDS, permuted, positions, round_keys, substitute_keys, substitutes, tried
from pixelgen_fast.errors import InputError

_ROUND, _LAP = (1, 0), 2  # streams of keys beside those of order.py


class Sampler(Protocol):
    def indexes(self, numbers: Iterable[int]) -> np.ndarray:
        """int64 [n], the images of n image numbers (>= 0)."""

    def substitutes(self, number: int) -> Iterator[int]:
        """Images to try in place of image `number` where it cannot be read."""


class UniformSampler:
    """See above. size: N."""

    def __init__(self, seed: int, size: int) -> None:
        self.seed, self.size = seed, size

    def indexes(self, numbers: Iterable[int]) -> np.ndarray:
        return positions(self.seed, numbers, self.size)

    def substitutes(self, number: int) -> Iterator[int]:
        return substitutes(self.seed, number, self.size)


class ClassBalancedSampler:
    """See above. labels: int64 [N]. Where they are not sorted it keeps 8 bytes an image. In place of an image that
    cannot be read come those of its class first."""

    def __init__(self, seed: int, labels: np.ndarray) -> None:
        self.seed, self.size = seed, len(labels)
        counts = np.bincount(labels)
        self._classes = np.flatnonzero(counts)
        self._counts = counts[self._classes]
        self._begins = np.cumsum([0, *self._counts])[:-1]
        in_order = bool((labels[1:] >= labels[:-1]).all())
        self._by_class = None if in_order else np.argsort(labels, kind="stable")

    def indexes(self, numbers: Iterable[int]) -> np.ndarray:
        rounds, kinds = self._drawn(np.asarray([*numbers], dtype=np.int64))
        laps, places = np.divmod(rounds, self._counts[kinds])
        labels = self._classes[kinds].tolist()
        keys = [_lap_keys(self.seed, label, lap) for label, lap in zip(labels, laps.tolist(), strict=True)]
        within = permuted(np.array(keys, dtype=np.uint64).reshape(-1, ROUNDS).T, places, self._counts[kinds])
        return self._images(kinds, within)

    def substitutes(self, number: int) -> Iterator[int]:
        _, (kind,) = self._drawn(np.array([number]))
        places = tried(substitute_keys(self.seed, number), int(self._counts[kind]))
        yield from (int(self._images(kind, place)) for place in places)
        yield from substitutes(self.seed, number, self.size)

    def _drawn(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The round and the class of image numbers, as a place in `_classes`: int64 [n] each."""
        count = len(self._classes)
        rounds, places = np.divmod(numbers, count)
        kinds = np.empty_like(places)
        for r in np.unique(rounds).tolist():
            chosen = rounds == r
            kinds[chosen] = permuted(_round_keys(self.seed, r), places[chosen], count)
        return rounds, kinds

    def _images(self, kinds: np.ndarray, within: np.ndarray) -> np.ndarray:
        """Indexes of the images that stand at places `within` of classes."""
        at = self._begins[kinds] + within
        return at if self._by_class is None else self._by_class[at]


def choose_sampler(index: ImageIndex, seed: int, class_balanced: bool) -> Sampler:
    """The sampler of a run."""
    return ClassBalancedSampler(seed, index.labels) if class_balanced else UniformSampler(seed, len(index))


def describe_shares(index: ImageIndex) -> str:
    """What balancing the classes of a data set means, in words. Raises InputError where there is one class only."""
    counts = np.bincount(index.labels, minlength=len(index.classes))
    there = counts[counts > 0]
    if len(there) < 2:
        raise InputError(
            f"data.class_balanced is true, and all images of {index.root} are of one class: set it to false"
        )
    least, most = (len(index) / (len(there) * count) for count in (there.max(), there.min()))
    empty = int((counts == 0).sum())
    without = f"; {empty:,} classes have no images and are never shown" if empty else ""
    return (
        f"classes in equal shares (data.class_balanced): in {len(index):,} images each image of the smallest class, "
        f"of {there.min():,}, comes {most:.3g} times, of the largest, of {there.max():,}, {least:.3g} times{without}"
    )


@lru_cache(maxsize=64)
def _round_keys(seed: int, r: int) -> tuple[int, ...]:
    return round_keys(seed, r, _ROUND)


@lru_cache(maxsize=4096)
def _lap_keys(seed: int, label: int, lap: int) -> tuple[int, ...]:
    return round_keys(seed, lap, (_LAP, label))
