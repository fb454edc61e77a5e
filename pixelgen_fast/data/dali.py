"""Endless micro-batches of uint8 images on the training device.

The loader is a function of the image number: batches depend on (index, seed, size, global batch, start) and on nothing
that happened before, so a run resumes at image S by starting a loader there, and W ranks see the slices of the one
global batch. See source.py for which image stands where, crop.py for the crop.

    bytes -> decode -> [halve] x n -> antialiased bicubic resize -> middle S x S -> flip if Philox says so

DALI decodes; the crop is DALI's too where a GPU decodes (pipeline.py), and torch's on a CPU (fast_crop.py), one
micro-batch ahead of what is given.

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
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple, get_args

import numpy as np
import torch
from pixelgen_kernels import philox
from torch import Tensor

from pixelgen_fast.config import Data
from pixelgen_fast.data import Batch
from pixelgen_fast.data.encoded import UnreadableImage
from pixelgen_fast.data.fast_crop import Cropper
from pixelgen_fast.data.image_index import ImageIndex
from pixelgen_fast.data.order import Order
from pixelgen_fast.data.pipeline import HALVINGS, Pipeline, Trial, start
from pixelgen_fast.data.readers import InProcess, Readers
from pixelgen_fast.data.source import KEPT_BYTES, Item, Source
from pixelgen_fast.data.storage import patiently
from pixelgen_fast.errors import InputError
from pixelgen_fast.settings import Crop

# So many unreadable images are borne in a data set of any size.
_FEW = 10
_log = logging.getLogger(__name__)


class _Taken(NamedTuple):
    """A micro-batch that the pipeline gave: images uint8 [B, S, S, 3], which image of the index each is, int64 [B], and
    their numbers. held: what must stay until the images are cropped."""

    images: Tensor
    indexes: np.ndarray
    numbers: range
    held: object = None


class Loader:
    """Iterate over this rank's micro-batches without end: `for batch in Loader(...)` gives `Batch` on `device`.

    index: what `open_index` gives. order: which images, from where on; its seed also decides the flips. settings: the
    section `data`: image_size S; class_balanced, whether classes or images come equally often; crop "adm", or "none"
    for images that are S x S already (checked); flip; workers, reader processes (0: read in this process, best for
    small images); threads, which decode and crop; prefetch, micro-batches kept ready; hw_decoder_load, the share of a
    batch for the hardware JPEG engines; wait_seconds, how long data that are away are waited for; max_unreadable, the
    share of unreadable images that is borne. decoder: "cpu" or "mixed" (NVIDIA's JPEG decoder; GPU only); None takes
    "mixed" on a GPU. asked: whether the run is asked to stop, which ends waiting for data. kept_bytes: see Source.

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
        kept_bytes: int = KEPT_BYTES,
    ) -> None:
        self.device = torch.device(device)
        decoder = decoder or ("mixed" if self.device.type == "cuda" else "cpu")
        _check(index, settings, decoder, self.device)
        self.index, self.order, self.settings = index, order, settings
        self.wait_seconds = 0.0
        self.replaced: dict[str, str] = {}
        crop = "none" if index.size == settings.image_size else settings.crop
        if later := crop == "adm" and decoder == "cpu":
            crop = "later"
        self._source = Source(
            index,
            order.seed,
            size=settings.image_size,
            crop=crop,
            halvings=HALVINGS if crop == "adm" else 0,
            class_balanced=settings.class_balanced,
            kept_bytes=kept_bytes,
        )
        self._cropper = Cropper(settings.image_size, settings.threads, pinned=self._on_gpu) if later else None
        self._ahead: _Taken | Exception | None = None
        self._decoding = {
            "decoder": decoder,
            "hw_decoder_load": settings.hw_decoder_load,
            "device_id": (self.device.index or 0) if decoder == "mixed" else None,
        }
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
        taken = self._take()
        images, numbers = self._there(taken.images), torch.tensor(taken.numbers)
        if self.settings.flip:
            mirrored = philox.uniform(self.order.seed, numbers, philox.FLIP, 1)[:, 0] < 0.5
            images = torch.where(self._there(mirrored)[:, None, None, None], images.flip(2), images)
        labels = torch.from_numpy(self.index.labels[taken.indexes])
        batch = Batch(images, self._there(labels), self._there(numbers))
        self.wait_seconds += time.perf_counter() - began
        return batch

    def close(self) -> None:
        """Stop the reader processes and free DALI's memory. The loader gives no batch after it."""
        if self._cropper is not None:
            self._cropper.close()
        self._pipeline = self._ahead = None
        self._readers.close()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _there(self, x: Tensor) -> Tensor:
        """A tensor on the device. From memory that is not pinned it would wait for all that the device has to do."""
        if x.is_cuda or not self._on_gpu:
            return x
        return (x if x.is_pinned() else x.pin_memory()).to(self.device, non_blocking=True)

    @property
    def _on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def _take(self) -> _Taken:
        """The next micro-batch, cropped. Its successor is being cropped meanwhile; an error in that waits its turn."""
        if self._cropper is None or self._pipeline is None:
            return self._run()
        taken = self._ahead or self._run()
        if isinstance(taken, Exception):
            raise taken
        self._cropper.finish()
        try:
            self._ahead = self._run()
        except Exception as error:
            self._ahead = error
        return taken

    def _build(self) -> None:
        """Start the pipeline at micro-batch self._batch, with everything known to be bad left out."""
        self._pipeline = None  # before the new one starts: two would hold their memory at once
        self._readers.begin(self._batch)
        self._pipeline = start(
            self._give,
            self._source,
            batch_size=self.order.micro_batch,
            num_threads=self.settings.threads,
            prefetch_queue_depth=self.settings.prefetch,
            **self._decoding,
        )

    def _give(self) -> list[Item]:
        """The items of the pipeline's next micro-batch."""
        items, found = self._readers.next()
        for i, reason in found.items():
            self._note_unreadable(i, reason)
        return items

    def _run(self) -> _Taken:
        """Micro-batch self._batch, whose crop, where it is not DALI's, has been started."""
        if self._pipeline is None:
            raise InputError("this loader is closed: make a new one")
        while True:
            try:
                stream = torch.cuda.current_stream(self.device) if self._decoding["decoder"] == "mixed" else None
                images, indexes = self._pipeline.run(stream)
            except RuntimeError as error:
                if not self._found_bad():
                    self._allow_restart(error)
            else:
                numbers = self.order.numbers(self._batch)
                self._batch += 1
                indexes = np.array(indexes.as_tensor())
                if self._cropper is None:
                    return _Taken(torch.from_dlpack(images.as_tensor()), indexes, numbers)
                decoded = [np.asarray(image) for image in images]
                return _Taken(self._cropper.start(decoded), indexes, numbers, images)
            self._build()  # outside the except clause, whose error would keep the failed pipeline's memory

    def _found_bad(self) -> bool:
        """Mark the unreadable images among those that DALI was working on; return whether there were any."""
        trial = Trial(self._source, self._decoding)
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
