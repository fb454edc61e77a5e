"""Endless micro-batches of uint8 images on the training device, decoded and cropped by DALI.

The loader is a function of the image number: batches depend on (index, seed, size, global batch, start) and on nothing
that happened before, so a run resumes at image S by starting a loader there, and W ranks see the slices of the one
global batch. See source.py for which image stands where, crop.py for the crop.

    bytes -> decode -> [halve] x 0..3 -> antialiased bicubic resize -> middle S x S -> flip if Philox says so

An image that does not decode never stops the run. Most are found from their header and end by the reader; when DALI
fails on one, its whole batch fails: the images of that batch are then tried one by one, the bad ones are marked and
the pipeline is built again at this batch. Replaced is an image by the next readable one of the index, with that one's
label.

B micro-batch, S side in pixels.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
from pixelgen_fast.data.index import ImageIndex
from pixelgen_fast.data.order import Order
from pixelgen_fast.data.source import HALVING, HEAD, Item, Source
from pixelgen_fast.errors import InputError
from pixelgen_fast.settings import Crop

# Halvings that the pipeline performs, enough below 16 S pixels; each costs about 15 us an image even when not needed.
_HALVINGS = 3
_log = logging.getLogger(__name__)


class Loader:
    """Iterate over this rank's micro-batches without end: `for batch in Loader(...)` gives `Batch` on `device`.

    index: what `open_index` gives. order: which images, from where on; its seed also decides the flips. settings: the
    section `data`: image_size S; crop "adm", or "none" for images that are S x S already (checked); flip; workers,
    reader processes (0: read in this process, best for small images); threads of DALI; prefetch, micro-batches kept
    ready; hw_decoder_load, the share of a batch for the hardware JPEG engines. decoder: "cpu" or "mixed" (NVIDIA's JPEG
    decoder; GPU only); None takes "mixed" on a GPU.

    wait_seconds: time the consumer spent waiting so far. replaced: path -> reason of every unreadable image met.
    Raises ValueError for sizes that do not divide, an unknown crop or decoder, or (while iterating, naming the file) an
    image of another size with crop "none"; UnreadableImage when no image of the index can be read.
    """

    def __init__(
        self,
        index: ImageIndex,
        order: Order,
        settings: Data,
        device: str | torch.device = "cpu",
        decoder: str | None = None,
    ) -> None:
        self.device = torch.device(device)
        decoder = decoder or ("mixed" if self.device.type == "cuda" else "cpu")
        _check(index, settings, decoder, self.device)
        self.index, self.order, self.settings = index, order, settings
        self.wait_seconds = 0.0
        self.replaced: dict[str, str] = {}
        crop = "none" if index.size == settings.image_size else settings.crop
        self._source_settings = {
            "size": settings.image_size, "crop": crop, "halvings": _HALVINGS if crop == "adm" else 0,
        }  # fmt: skip
        self._decode_settings = {
            "decoder": decoder, "hw_decoder_load": settings.hw_decoder_load, "to_gpu": self._on_gpu,
        }  # fmt: skip
        self._bad: dict[int, str] = {}
        self._batch = 0
        self._restarted_at: int | None = None
        self._pipeline: Pipeline | None = None
        self._build()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        began = time.perf_counter()
        images, indexes = self._run()
        numbers = torch.tensor(self.order.numbers(self._batch))
        self._report_replaced(numbers, indexes)
        self._batch += 1
        if self.settings.flip:
            mirrored = philox.uniform(self.order.seed, numbers, philox.FLIP, 1)[:, 0] < 0.5
            images = torch.where(mirrored.to(self.device)[:, None, None, None], images.flip(2), images)
        labels = torch.from_numpy(self.index.labels[indexes])
        batch = Batch(images, labels.to(self.device), numbers.to(self.device))
        self.wait_seconds += time.perf_counter() - began
        return batch

    def close(self) -> None:
        """Stop the reader processes and free DALI's memory. The loader gives no batch after it."""
        self._pipeline = None

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def _on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def _build(self) -> None:
        """Start the pipeline at micro-batch self._batch, with everything known to be bad left out."""
        self.close()  # before the new one starts: two would hold their memory at once
        self._source = Source(
            self.index, self.order, first=self._batch, bad=frozenset(self._bad), **self._source_settings
        )
        workers = self.settings.workers
        parallel = {"py_num_workers": workers, "py_start_method": "spawn"} if workers else {}
        self._pipeline = _pipeline(
            self._source,
            parallel=workers > 0,
            size=self._source.size,
            halvings=self._source.halvings,
            cropped=self._source.crop != "none",
            batch_size=self.order.micro_batch,
            num_threads=self.settings.threads,
            device_id=self._device_id,
            prefetch_queue_depth=self.settings.prefetch,
            **self._decode_settings,
            **parallel,
        )
        if workers:
            with interrupts_ignored():
                self._pipeline.start_py_workers()
        self._pipeline.build()

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
            except Exception as error:  # what a reader process raises reaches us as a bare Exception
                if not self._found_bad():
                    self._allow_restart(error)
            else:
                return torch.from_dlpack(images.as_tensor()), np.array(indexes.as_tensor())
            self._build()  # outside the except clause, whose error would keep the failed pipeline and its readers alive

    def _found_bad(self) -> bool:
        """Mark the unreadable images among those that DALI was working on; return whether there were any."""
        known = len(self._bad)
        trial = _Trial(self._source, self._device_id, self._decode_settings)
        for batch in range(self._batch, self._batch + self.settings.prefetch + 1):
            for number in self.order.numbers(batch):
                item = self._source.item(self._source.wanted(number))
                i = int(item.index)
                if i not in self._bad and (reason := trial.failure(item)):
                    self._bad[i] = reason
                    self._log_replaced(i, reason)
            if len(self._bad) > known:
                return True
        return False

    def _allow_restart(self, error: Exception) -> None:
        """A failure that no image explains is tried once more and then raised."""
        if self._restarted_at == self._batch:
            raise error
        self._restarted_at = self._batch
        number = self.order.first(self._batch)
        _log.warning("the data pipeline failed at image %d and starts again: %s", number, error)

    def _report_replaced(self, numbers: Tensor, indexes: np.ndarray) -> None:
        """Log the images that the readers found unreadable and passed over."""
        for number, got in zip(numbers.tolist(), indexes.tolist(), strict=True):
            i = self._source.wanted(number)
            while i != got:
                if i not in self._bad and self.index.path(i) not in self.replaced:
                    self._log_replaced(i, self._reason(i))
                i = (i + 1) % len(self.index)

    def _reason(self, i: int) -> str:
        try:
            self._source.prepare(i)
        except (UnreadableImage, OSError) as error:
            return str(error)
        return "storage failed to give it once, and gives it now"

    def _log_replaced(self, i: int, reason: str) -> None:
        path = self.index.path(i)
        self.replaced[path] = reason
        _log.warning("unreadable image %s: %s; the next readable one takes its place", path, reason)


class _Trial:
    """Runs single items through the loader's own pipeline, to see which of them makes it fail."""

    def __init__(self, source: Source, device_id: int | None, decode_settings: dict[str, Any]) -> None:
        self._source = source
        self._settings = {"size": source.size, "halvings": source.halvings, "cropped": source.crop != "none"}
        self._settings |= {"batch_size": 1, "num_threads": 1, "device_id": device_id, "prefetch_queue_depth": 1}
        self._settings |= decode_settings
        self._pipeline: Pipeline | None = None

    def failure(self, item: Item) -> str | None:
        """Why `item` does not decode, or None when it does."""
        if self._pipeline is None:
            self._pipeline = _pipeline(lambda: self._source.fields(self._item), parallel=False, **self._settings)
        self._item = item
        try:
            self._pipeline.run()
        except RuntimeError as error:
            self._pipeline = None  # a pipeline that has failed runs no more
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
    parallel: bool,
    size: int,
    halvings: int,
    cropped: bool,
    decoder: str,
    hw_decoder_load: float,
    to_gpu: bool,
) -> tuple[DataNode, DataNode]:
    """Items of `source` -> images uint8 [S, S, 3] and the index of each."""
    fields = 3 if cropped else 2
    data, index, *geometry = fn.external_source(
        source=source,
        num_outputs=fields,
        batch=False,
        parallel=parallel,
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


@contextmanager
def interrupts_ignored() -> Iterator[None]:
    """Processes started inside ignore SIGINT (an ignored signal is inherited): Ctrl-C is for the trainer to handle.

    Outside the main thread signals cannot be set, and nothing is done.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


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
