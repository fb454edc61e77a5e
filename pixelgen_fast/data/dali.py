"""Endless micro-batches of uint8 images on the training device, decoded and cropped by DALI.

The loader is a function of the image number: batches depend on (index, seed, size, global batch, start) and on nothing
that happened before, so a run resumes at image S by starting a loader there, and W ranks see the slices of the one
global batch. See source.py for which image stands where, crop.py for the crop.

    bytes -> decode -> [halve] x 0..3 -> antialiased bicubic resize -> middle S x S -> flip if Philox says so

An image that does not decode never stops the run. Most are found from their header and end by the reader; when DALI
fails on one, its whole batch fails: the images of that batch are then tried one by one, the bad ones are marked and
the pipeline is built again at this batch. Replaced is an image by another one that the image number draws, with that
one's label. Above a stated share of such images the data set is taken to be damaged, and the loader gives no more.

Bytes come from reader processes (readers.py) into this one, and from here to DALI: none of DALI's own processes and
locks, of which a killed one would stop the run for ever.

B micro-batch, S side in pixels.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterator
from typing import Any, get_args

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.data_node import DataNode
from nvidia.dali.pipeline import Pipeline
from pixelgen_kernels import philox
from torch import Tensor

from pixelgen_fast.config import Data
from pixelgen_fast.data import Batch
from pixelgen_fast.data.encoded import UnreadableImage, decode
from pixelgen_fast.data.image_index import ImageIndex
from pixelgen_fast.data.order import Order
from pixelgen_fast.data.readers import InProcess, Readers
from pixelgen_fast.data.source import HALVING, HEAD, Item, Source
from pixelgen_fast.data.storage import patiently, shortage
from pixelgen_fast.errors import InputError
from pixelgen_fast.settings import Crop

# Halvings that the pipeline performs, enough below 16 S pixels; each costs about 15 us an image even when not needed.
_HALVINGS = 3
# So many unreadable images are borne in a data set of any size.
_FEW = 10
_NO_MEMORY = re.compile(r"bad_alloc|out of memory|cannot allocate|memory allocation", re.IGNORECASE)
_log = logging.getLogger(__name__)


class Loader:
    """Iterate over this rank's micro-batches without end: `for batch in Loader(...)` gives `Batch` on `device`.

    index: what `open_index` gives. order: which images, from where on; its seed also decides the flips. settings: the
    section `data`: image_size S; class_balanced, whether classes or images come equally often; crop "adm", or "none"
    for images that are S x S already (checked); flip; workers, reader processes (0: read in this process, best for
    small images); threads of DALI; prefetch, micro-batches kept ready; hw_decoder_load, the share of a batch for the
    hardware JPEG engines; wait_seconds, how long data that are away are waited for; max_unreadable, the share of
    unreadable images that is borne. decoder: "cpu" or "mixed" (NVIDIA's JPEG decoder; GPU only); None takes "mixed" on
    a GPU. asked: whether the run is asked to stop, which ends waiting for data.

    wait_seconds: time the consumer spent waiting so far. replaced: path -> reason of every unreadable image met.
    Raises ValueError for sizes that do not divide, an unknown crop or decoder, or (while iterating, naming the file) an
    image of another size with crop "none"; while iterating also UnreadableImage when too many images cannot be read,
    DataAway and ResourceError. No batch comes after an error.
    """

    def __init__(
        self,
        index: ImageIndex,
        order: Order,
        settings: Data,
        device: str | torch.device = "cpu",
        decoder: str | None = None,
        asked: Callable[[], bool] = lambda: False,
    ) -> None:
        self.device = torch.device(device)
        decoder = decoder or ("mixed" if self.device.type == "cuda" else "cpu")
        _check(index, settings, decoder, self.device)
        self.index, self.order, self.settings = index, order, settings
        self.wait_seconds = 0.0
        self.replaced: dict[str, str] = {}
        crop = "none" if index.size == settings.image_size else settings.crop
        halvings = _HALVINGS if crop == "adm" else 0
        self._source = Source(
            index,
            order.seed,
            size=settings.image_size,
            crop=crop,
            halvings=halvings,
            class_balanced=settings.class_balanced,
        )
        self._decode_settings = {
            "decoder": decoder, "hw_decoder_load": settings.hw_decoder_load, "to_gpu": self._on_gpu,
        }  # fmt: skip
        self._asked = asked
        self._batch = 0
        self._restarted_at: int | None = None
        self._pipeline: Pipeline | None = None
        patience, workers = settings.wait_seconds, settings.workers
        self._readers = (
            Readers(self._source, order, patience, asked, count=workers, ahead=settings.prefetch + 1)
            if workers
            else InProcess(self._source, order, patience, asked)
        )
        self._build()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        began = time.perf_counter()
        images, indexes = self._run()
        numbers = torch.tensor(self.order.numbers(self._batch))
        self._batch += 1
        if self.settings.flip:
            mirrored = philox.uniform(self.order.seed, numbers, philox.FLIP, 1)[:, 0] < 0.5
            images = torch.where(self._there(mirrored)[:, None, None, None], images.flip(2), images)
        labels = torch.from_numpy(self.index.labels[indexes])
        batch = Batch(images, self._there(labels), self._there(numbers))
        self.wait_seconds += time.perf_counter() - began
        return batch

    def close(self) -> None:
        """Stop the reader processes and free DALI's memory. The loader gives no batch after it."""
        self._pipeline = None
        self._readers.close()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _there(self, x: Tensor) -> Tensor:
        """A small tensor on the device. From memory that is not pinned it would wait for all that the device has to
        do."""
        return x.pin_memory().to(self.device, non_blocking=True) if self._on_gpu else x.to(self.device)

    @property
    def _on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def _build(self) -> None:
        """Start the pipeline at micro-batch self._batch, with everything known to be bad left out."""
        self._pipeline = None  # before the new one starts: two would hold their memory at once
        self._readers.begin(self._batch)
        self._pipeline = _pipeline(
            self._give,
            size=self._source.size,
            halvings=self._source.halvings,
            cropped=self._source.crop != "none",
            batch_size=self.order.micro_batch,
            num_threads=self.settings.threads,
            device_id=self._device_id,
            prefetch_queue_depth=self.settings.prefetch,
            **self._decode_settings,
        )
        self._pipeline.build()

    def _give(self) -> tuple[list[np.ndarray], ...]:
        """What the pipeline takes for its next micro-batch."""
        items, found = self._readers.next()
        for i, reason in found.items():
            self._note_unreadable(i, reason)
        return _columns(items, self._source.crop)

    @property
    def _device_id(self) -> int | None:
        return (self.device.index or 0) if self._on_gpu else None

    def _run(self) -> tuple[Tensor, np.ndarray]:
        """The next decoded images [B, S, S, 3] on the device, and the index each was read from, int64 [B]."""
        if self._pipeline is None:
            raise InputError("this loader is closed: make a new one")
        while True:
            try:
                stream = torch.cuda.current_stream(self.device) if self._on_gpu else None
                images, indexes = self._pipeline.run(stream)
            except RuntimeError as error:
                if not self._found_bad():
                    self._allow_restart(error)
            else:
                return torch.from_dlpack(images.as_tensor()), np.array(indexes.as_tensor())
            self._build()  # outside the except clause, whose error would keep the failed pipeline's memory

    def _found_bad(self) -> bool:
        """Mark the unreadable images among those that DALI was working on; return whether there were any."""
        trial = _Trial(self._source, self._device_id, self._decode_settings)
        for batch in range(self._batch, self._batch + self.settings.prefetch + 1):
            numbers = self.order.numbers(batch)
            read = lambda numbers=numbers: list(self._source.items(numbers))  # noqa: E731
            items = patiently(read, self.settings.wait_seconds, self._asked)
            failed = {item.index: reason for item in items if (reason := trial.failure(item))}
            self._source.bad.update(failed)
            for i, reason in failed.items():
                self._note_unreadable(i, reason)
            if failed:
                return True
        return False

    def _allow_restart(self, error: RuntimeError) -> None:
        """A failure that no image explains is tried once more and then raised."""
        if self._restarted_at == self._batch:
            raise error
        self._restarted_at = self._batch
        number = self.order.first(self._batch)
        _log.warning("the data pipeline failed at image %d and starts again: %s", number, error)

    def _note_unreadable(self, i: int, reason: str) -> None:
        """Say so, once for each image. Raises UnreadableImage when there are too many."""
        path = self.index.path(i)
        if path in self.replaced:
            return
        self.replaced[path] = reason
        _log.warning("unreadable image %s: %s; another one takes its place", path, reason)
        borne = max(_FEW, int(self.settings.max_unreadable * len(self.index)))
        if len(self.replaced) > borne:
            raise UnreadableImage(
                f"{len(self.replaced):,} of the {len(self.index):,} images of {self.index.root} are unreadable, more "
                f"than the {borne:,} that data.max_unreadable {self.settings.max_unreadable:g} allows; the last is "
                f"{path}: {reason}. See `pixelgen data scan`"
            )


def _columns(items: list[Item], crop: str) -> tuple[list[np.ndarray], ...]:
    """(data, index) of items with crop "none", else (data, index, geometry)."""
    columns = [item.data for item in items], [np.array(item.index) for item in items]
    return columns if crop == "none" else (*columns, [item.geometry for item in items])


class _Trial:
    """Runs single items through the loader's own pipeline, to see which of them makes it fail."""

    def __init__(self, source: Source, device_id: int | None, decode_settings: dict[str, Any]) -> None:
        self._source = source
        self._settings = {"size": source.size, "halvings": source.halvings, "cropped": source.crop != "none"}
        self._settings |= {"batch_size": 1, "num_threads": 1, "device_id": device_id, "prefetch_queue_depth": 1}
        self._settings |= decode_settings
        self._pipeline: Pipeline | None = None

    def failure(self, item: Item) -> str | None:
        """Why `item` does not decode, or None when it does. Raises ResourceError when memory is what lacks."""
        if self._pipeline is None:
            self._pipeline = _pipeline(lambda: _columns([self._item], self._source.crop), **self._settings)
        self._item = item
        try:
            self._pipeline.run()
        except RuntimeError as error:
            self._pipeline = None  # a pipeline that has failed runs no more
            if _NO_MEMORY.search(str(error)):
                raise shortage(f"cannot decode {self._source.index.path(item.index)}", MemoryError(error)) from error
            return _explain(item, error)
        return None


def _explain(item: Item, error: RuntimeError) -> str:
    """The reason in PIL's words when PIL fails too, which are shorter than DALI's."""
    try:
        decode(item.data.tobytes())
    except UnreadableImage as unreadable:
        return str(unreadable)
    return f"DALI: {error}"


@pipeline_def(enable_conditionals=True)
def _pipeline(
    source: Callable,
    *,
    size: int,
    halvings: int,
    cropped: bool,
    decoder: str,
    hw_decoder_load: float,
    to_gpu: bool,
) -> tuple[DataNode, DataNode]:
    """Micro-batches of `source` -> images uint8 [S, S, 3] and the index of each."""
    fields = 3 if cropped else 2
    data, index, *geometry = fn.external_source(
        source=source,
        num_outputs=fields,
        batch=True,
        dtype=[types.UINT8, types.INT64, types.FLOAT][:fields],
        ndim=[1, 0, 1][:fields],
    )
    # EXIF orientation is left alone, as ADM does.
    options = {"hw_decoder_load": hw_decoder_load} if decoder == "mixed" else {}
    images = fn.decoders.image(data, device=decoder, output_type=types.RGB, adjust_orientation=False, **options)
    if cropped:
        (geometry,) = geometry
        for k in range(halvings):
            if geometry[0] > k:
                images = _halve(images, geometry[HEAD + HALVING * k : HEAD + HALVING * (k + 1)])
        images = fn.resize(images, size=geometry[1:3], interp_type=types.INTERP_CUBIC, antialias=True)
        images = fn.slice(images, start=fn.cast(geometry[3:5], dtype=types.INT32), shape=[size, size], axes=[0, 1])
    if to_gpu and decoder == "cpu":
        images = images.gpu()
    return images, index


def _halve(images: DataNode, region: DataNode) -> DataNode:
    """Average 2 x 2 pixels: rows first pairwise to the left, each mean rounded up as PIL's box filter does."""

    def picked(dy: int, dx: int) -> DataNode:
        start = region[2:4] + np.array([dy, dx], dtype=np.float32)
        return fn.resize(
            images,
            size=region[0:2],
            roi_start=start,
            roi_end=start + region[4:6],
            interp_type=types.INTERP_NN,
            antialias=False,
        )

    return _mean_up(_mean_up(picked(0, 0), picked(0, 1)), _mean_up(picked(1, 0), picked(1, 1)))


def _mean_up(a: DataNode, b: DataNode) -> DataNode:
    """ceil((a + b) / 2) of uint8 without leaving uint8: a + b = 2 (a | b) - (a ^ b)."""
    return (a | b) - ((a ^ b) >> np.uint8(1))


def _check(index: ImageIndex, settings: Data, decoder: str, device: torch.device) -> None:
    size, crop = settings.image_size, settings.crop
    if size < 1 or min(settings.workers, settings.threads - 1, settings.prefetch - 1) < 0:
        raise InputError(
            f"workers {settings.workers} must be at least 0, image_size {size}, threads {settings.threads} and "
            f"prefetch {settings.prefetch} at least 1"
        )
    if crop not in get_args(Crop):
        raise InputError(f"crop {crop!r} is none of {', '.join(get_args(Crop))}")
    if crop == "none" and index.size not in (None, size):
        raise InputError(f"{index.root} holds images of {index.size} pixels, not {size}: use crop 'adm' or pack anew")
    if decoder not in ("cpu", "mixed"):
        raise InputError(f"decoder {decoder!r} is neither 'cpu' nor 'mixed'")
    if decoder == "mixed" and device.type != "cuda":
        raise InputError(f"decoder 'mixed' needs a GPU, but the device is {device}: use decoder 'cpu'")
