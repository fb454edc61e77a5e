"""Which encoded image stands at each place of each micro-batch, and how it is to be cropped; runs in reader processes.

A worker hands DALI the bytes, the index it read and the geometry of the crop: of the image that order.py names, or of
the next readable one after it. Everything is a function of (seed, number) and of the files' contents. This module
imports neither torch nor DALI, so that a reader process starts quickly.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import Image

from pixelgen_fast.data.crop import CropPlan, crop_plan
from pixelgen_fast.data.encoded import UnreadableImage, as_ppm, decode, inspect
from pixelgen_fast.data.index import ImageIndex
from pixelgen_fast.data.order import Order, position
from pixelgen_fast.errors import InputError

# geometry, float32: [number of halvings, resized h, w, offset y, x], then HALVING numbers for each halving:
# [halved h, w, region start y, x, region height, width]
HEAD, HALVING = 5, 6
# Encoded images up to this total stay in each reader's memory: a small data set is read from storage once.
_KEPT_BYTES = 64 * 2**20


class SampleInfo(Protocol):
    """The part of DALI's sample description that is used."""

    idx_in_batch: int
    iteration: int


class Item(NamedTuple):
    """data: uint8 [bytes], encoded image. geometry: float32 [HEAD + HALVING * halvings]. index: int64 scalar."""

    data: np.ndarray
    geometry: np.ndarray
    index: np.ndarray


class Source:
    """Gives DALI the items of micro-batches `first`, first + 1, ... of an order. Picklable.

    crop: "adm" or "none". halvings: how many box halvings the pipeline performs; an image that needs more arrives
    halved by PIL already. bad: indexes known to be unreadable, never read.
    """

    def __init__(
        self,
        index: ImageIndex,
        order: Order,
        *,
        size: int,
        crop: str,
        halvings: int,
        first: int = 0,
        bad: frozenset[int] = frozenset(),
    ) -> None:
        self.index, self.order, self.size, self.crop, self.halvings = index, order, size, crop, halvings
        self.first, self.bad = first, bad
        self._kept: dict[int, Item] = {}
        self._room = _KEPT_BYTES

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Arriving in a reader process: see to it that the process does not outlive the one that started it."""
        self.__dict__.update(state)
        if parent := multiprocessing.parent_process():
            threading.Thread(target=_exit_after, args=(parent,), daemon=True).start()

    def wanted(self, number: int) -> int:
        """The index that image `number` has, before unreadable ones are replaced."""
        return position(self.order.seed, number, len(self.index))

    def __call__(self, info: SampleInfo) -> tuple[np.ndarray, ...]:
        """What the pipeline takes for one place of a micro-batch."""
        return self.fields(self.item(self.wanted(self.order.first(self.first + info.iteration) + info.idx_in_batch)))

    def fields(self, item: Item) -> tuple[np.ndarray, ...]:
        """(data, index) with crop "none", else (data, index, geometry)."""
        return (item.data, item.index) if self.crop == "none" else (item.data, item.index, item.geometry)

    def item(self, index: int) -> Item:
        """The item of the first readable image at or after `index`, in index order, from the end on to the beginning.

        Raises UnreadableImage when there is none.
        """
        reason = "see the log"
        for i in range(index, index + len(self.index)):
            i %= len(self.index)
            if i in self._kept:
                return self._kept[i]
            if i not in self.bad:
                try:
                    return self._keep(i, self.prepare(i))
                except (UnreadableImage, OSError) as error:
                    reason = str(error)
        raise UnreadableImage(
            f"all {len(self.index):,} images of {self.index.root} are unreadable ({reason}): see `pixelgen data scan`"
        )

    def prepare(self, i: int) -> Item:
        """Image i as an item. Raises UnreadableImage or OSError with the reason when it cannot be used.

        Raises ValueError naming the file when crop is "none" and its size is another one.
        """
        data = self.index.read(i)
        header = inspect(data)
        height, width = header.height, header.width
        if self.crop == "none":
            if (height, width) != (self.size, self.size):
                raise InputError(
                    f"{self.index.path(i)} has {height} x {width} pixels, not {self.size} x {self.size}: crop 'none' "
                    "takes images as they are; use crop 'adm', or pack the data at that size"
                )
            return self._item(data if header.direct else as_ppm(decode(data)), np.zeros(HEAD, np.float32), i)
        plan = crop_plan(height, width, self.size)
        early = len(plan.halved) - self.halvings
        if early > 0 or not header.direct:
            image = decode(data)
            for height, width in plan.halved[: max(early, 0)]:
                image = image.resize((width, height), Image.Resampling.BOX)
            data = as_ppm(image)
        return self._item(data, geometry((height, width), plan, plan.halved[max(early, 0) :], self.halvings), i)

    def _keep(self, i: int, item: Item) -> Item:
        if item.data.nbytes <= self._room:
            self._kept[i] = item
            self._room -= item.data.nbytes
        return item

    @staticmethod
    def _item(data: bytes, numbers: np.ndarray, i: int) -> Item:
        return Item(np.frombuffer(data, dtype=np.uint8), numbers, np.array(i, dtype=np.int64))


def _exit_after(parent: BaseProcess) -> None:
    """DALI's readers wait for work for ever when their parent is killed."""
    parent.join()
    os._exit(1)


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
