"""Images that a run never trains on, and the order in which they are looked at.

    key(image) = BLAKE2b-64 of its name below the root, keyed by a seed;    held out where key < share 2^64

So whether an image is held out depends on the seed and its own name alone: images that are added or removed later
change nothing for the others. The images with the smallest keys are those that are looked at, a random choice over all
classes that is the same on every machine.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pixelgen_fast.data.image_index import ImageIndex
from pixelgen_fast.errors import InputError


class SubsetIndex(ImageIndex):
    """Some images of another index, in its order. numbers: int64 [N], increasing, of that index."""

    def __init__(self, whole: ImageIndex, numbers: np.ndarray) -> None:
        super().__init__(whole.root, whole.classes, whole.labels[numbers], whole.size)
        self.whole, self.numbers, self.kind = whole, numbers, whole.kind

    def path(self, i: int) -> str:
        return self.whole.path(int(self.numbers[i]))

    def places(self) -> Iterator[bytes]:
        wanted = np.zeros(len(self.whole), dtype=bool)
        wanted[self.numbers] = True
        return (place for place, there in zip(self.whole.places(), wanted.tolist(), strict=True) if there)

    def holder(self, i: int) -> Path:
        return self.whole.holder(int(self.numbers[i]))

    def read(self, i: int) -> bytes:
        return self.whole.read(int(self.numbers[i]))

    def damage(self, i: int, data: bytes) -> str | None:
        return self.whole.damage(int(self.numbers[i]), data)


def keys(index: ImageIndex, seed: int) -> np.ndarray:
    """The key of each image, uint64 [N]."""
    secret = (seed % 2**64).to_bytes(8, "little")
    digests = (hashlib.blake2b(place, digest_size=8, key=secret).digest() for place in index.places())
    return np.frombuffer(b"".join(digests), dtype="<u8").astype(np.uint64)


def split(index: ImageIndex, share: float, seed: int) -> tuple[SubsetIndex, SubsetIndex]:
    """(those to train on, those that are held out). Raises InputError where one of the two would be empty."""
    out = keys(index, seed) < np.uint64(share * 2**64)
    held, count = int(out.sum()), len(index)
    if held in (0, count):
        what = "holds out none" if held == 0 else "leaves none to train on"
        raise InputError(f"data.validation.share {share:g} of {count:,} images of {index.root} {what}; change it")
    return SubsetIndex(index, np.flatnonzero(~out)), SubsetIndex(index, np.flatnonzero(out))


def looked_at(index: ImageIndex, seed: int) -> Iterator[int]:
    """All images of an index in the order of their keys."""
    return iter(np.argsort(keys(index, seed), kind="stable").tolist())
