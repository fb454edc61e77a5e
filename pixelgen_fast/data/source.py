"""Which encoded image stands at each place of a micro-batch, and how it is to be cropped; runs in reader processes.

An item is the bytes, the index they were read from and the geometry of the crop: of the image that sampler.py names, or
of the first readable one of its substitutes. Everything is a function of (seed, number) and of the files' contents.
This module imports neither torch nor DALI, so that a reader process starts quickly.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from pixelgen_fast.data.crop import CropPlan, crop_plan
from pixelgen_fast.data.encoded import UnreadableImage, as_ppm, decode, inspect
from pixelgen_fast.data.image_index import ImageIndex
from pixelgen_fast.data.sampler import choose_sampler
from pixelgen_fast.data.storage import read_bytes, shortage
from pixelgen_fast.errors import InputError

# geometry, float32: [number of halvings, resized h, w, offset y, x], then HALVING numbers for each halving:
# [halved h, w, region start y, x, region height, width]
HEAD, HALVING = 5, 6
KEPT_BYTES = 64 * 2**20
_ITEM_BYTES = 512  # that an item takes beside its data: objects of Python and NumPy
_NO_GEOMETRY = np.zeros(HEAD, np.float32)


class Item(NamedTuple):
    """data: uint8 [bytes], encoded image. geometry: float32 [HEAD + HALVING * halvings]. index: of the image."""

    data: np.ndarray
    geometry: np.ndarray
    index: int


class Source:
    """Gives the items of image numbers. Picklable.

    seed, class_balanced: of the run's order. crop: "adm", "none", or "later" where the crop is made of decoded pixels
    and items have no geometry. halvings: how many box halvings the pipeline performs; an image that needs more arrives
    halved by PIL already. kept_bytes: of memory in each reader, in which encoded images stay, so that a small data
    set is read from storage once.

    bad: indexes known to be unreadable, never read; the loader adds to this set. found: index -> reason of images that
    turned out to be unreadable and are not in `bad`; whoever reads it clears it.
    """

    def __init__(
        self,
        index: ImageIndex,
        seed: int,
        *,
        size: int,
        crop: str,
        halvings: int,
        class_balanced: bool = False,
        kept_bytes: int = KEPT_BYTES,
    ) -> None:
        self.index, self.size, self.crop, self.halvings, self.kept_bytes = index, size, crop, halvings, kept_bytes
        self.sampler = choose_sampler(index, seed, class_balanced)
        self.bad: set[int] = set()
        self.found: dict[int, str] = {}
        self._kept: dict[int, Item] = {}
        self._room = kept_bytes

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"found": {}, "_kept": {}, "_room": self.kept_bytes}

    def items(self, numbers: Iterable[int]) -> Iterator[Item]:
        """The items of image numbers, in their order. Raises UnreadableImage when no image of the index can be read,
        and what `prepare` raises but for that."""
        numbers = [*numbers]
        for number, index in zip(numbers, self.sampler.indexes(numbers).tolist(), strict=True):
            yield self._item(number, index)

    def _item(self, number: int, index: int) -> Item:
        for i in chain([index], self.sampler.substitutes(number)):
            if i in self.bad:
                continue
            if i in self._kept:
                return self._kept[i]
            try:
                return self._keep(self.prepare(i))
            except UnreadableImage as error:
                self.found[i] = str(error)
        reason = next(iter(self.found.values()), "see the log")
        raise UnreadableImage(
            f"all {len(self.index):,} images of {self.index.root} are unreadable ({reason}): see `pixelgen data scan`"
        )

    def prepare(self, i: int) -> Item:
        """Image i as an item. Raises UnreadableImage with the reason when it is damaged or missing, DataAway or
        ResourceError when that is not the image's fault, and InputError naming the file when crop is "none" and its
        size is another one.
        """
        data = read_bytes(self.index, i)
        try:
            return self._prepared(i, data)
        except MemoryError as error:
            raise shortage(f"cannot decode {self.index.path(i)}", error) from error

    def _prepared(self, i: int, data: bytes) -> Item:
        header = inspect(data)
        height, width = header.height, header.width
        if self.crop == "none" and (height, width) != (self.size, self.size):
            raise InputError(
                f"{self.index.path(i)} has {height} x {width} pixels, not {self.size} x {self.size}: crop 'none' "
                "takes images as they are; use crop 'adm', or pack the data at that size"
            )
        if self.crop in ("none", "later"):
            return _item(data if header.direct else as_ppm(decode(data)), _NO_GEOMETRY, i)
        plan = crop_plan(height, width, self.size)
        early = len(plan.halved) - self.halvings
        if early > 0 or not header.direct:
            image = decode(data)
            for height, width in plan.halved[: max(early, 0)]:
                image = image.resize((width, height), Image.Resampling.BOX)
            data = as_ppm(image)
        return _item(data, geometry((height, width), plan, plan.halved[max(early, 0) :], self.halvings), i)

    def _keep(self, item: Item) -> Item:
        if (size := item.data.nbytes + _ITEM_BYTES) <= self._room:
            self._kept[item.index] = item
            self._room -= size
        return item


def _item(data: bytes, numbers: np.ndarray, i: int) -> Item:
    return Item(np.frombuffer(data, dtype=np.uint8), numbers, i)


def geometry(shape: tuple[int, int], plan: CropPlan, halved: list[tuple[int, int]], capacity: int) -> np.ndarray:
    """The crop of an image of `shape` (height, width) as float32 [HEAD + HALVING * capacity].

    A box filter that halves n pixels averages the pairs (2x, 2x + 1); for odd n = 2m + 1 it skips one pixel in the
    middle (there PIL averages three) and goes on with (2x + 1, 2x + 2). Nearest-neighbour sampling of m points at a
    pitch of n / m hits the first pixel of every pair when point x lies at x n / m + 1/2 + 1/(4m), since floor(x / m +
    1/2 + 1/(4m)) is 0 before the middle and 1 behind it. The region starts half a pitch before the first point.
    """
    numbers = np.zeros(HEAD + HALVING * capacity, dtype=np.float32)
    numbers[:HEAD] = (len(halved), *plan.resized, *plan.offset)
    source = np.array(shape, dtype=np.float64)
    for k, target in enumerate(np.array(halved, dtype=np.float64).reshape(-1, 2)):
        start = 0.5 + 1 / (4 * target) - source / target / 2
        numbers[HEAD + HALVING * k : HEAD + HALVING * (k + 1)] = (*target, *start, *source)
        source = target
    return numbers
