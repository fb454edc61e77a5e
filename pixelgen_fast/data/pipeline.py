"""What DALI does for the loader, and the only file that imports it: decoding, and on a GPU the crop as well.

    on a GPU   bytes -> decode -> [halve] x 0..3 -> antialiased bicubic resize -> middle S x S
    on a CPU   bytes -> decode; the crop is fast_crop.py's, whose filters take a third of the time of DALI's there

`file_pipeline` is DALI as it reads files by itself, which `pixelgen data bench` compares the loader with.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.data_node import DataNode
from nvidia.dali.pipeline import Pipeline

from pixelgen_fast.data.encoded import UnreadableImage, decode
from pixelgen_fast.data.source import HALVING, HEAD, Item, Source
from pixelgen_fast.data.storage import shortage

# Halvings that a pipeline performs, enough below 16 S pixels; each costs about 15 us an image even when not needed.
HALVINGS = 3
_NO_MEMORY = re.compile(r"bad_alloc|out of memory|cannot allocate|memory allocation", re.IGNORECASE)


class Trial:
    """Runs single items through the loader's own pipeline, to see which of them makes it fail. settings: of `start`."""

    def __init__(self, source: Source, settings: dict[str, Any]) -> None:
        self._source = source
        self._settings = settings | {"batch_size": 1, "num_threads": 1, "prefetch_queue_depth": 1}
        self._pipeline: Pipeline | None = None

    def failure(self, item: Item) -> str | None:
        """Why `item` does not decode, or None when it does. Raises ResourceError when memory is what lacks."""
        if self._pipeline is None:
            self._pipeline = start(lambda: [self._item], self._source, **self._settings)
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


def start(give: Callable[[], list[Item]], source: Source, **settings: Any) -> Pipeline:
    """A running pipeline over the micro-batches of items that `give` returns. settings: decoder "cpu" or "mixed",
    hw_decoder_load, and DALI's own."""

    def columns() -> tuple[list[np.ndarray], ...]:
        items = give()
        data, index = [item.data for item in items], [np.array(item.index) for item in items]
        return (data, index, [item.geometry for item in items]) if source.halvings else (data, index)

    pipeline = _pipeline(columns, size=source.size, halvings=source.halvings, **settings)
    pipeline.build()
    return pipeline


@pipeline_def(enable_conditionals=True)
def _pipeline(
    source: Callable, *, size: int, halvings: int, decoder: str, hw_decoder_load: float
) -> tuple[DataNode, DataNode]:
    """Micro-batches of `source` -> images uint8 [S, S, 3], or [h, w, 3] without halvings, and the index of each."""
    fields = 3 if halvings else 2
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
    if halvings:
        (geometry,) = geometry
        for k in range(halvings):
            if geometry[0] > k:
                images = _halve(images, geometry[HEAD + HALVING * k : HEAD + HALVING * (k + 1)])
        images = fn.resize(images, size=geometry[1:3], interp_type=types.INTERP_CUBIC, antialias=True)
        images = fn.slice(images, start=fn.cast(geometry[3:5], dtype=types.INT32), shape=[size, size], axes=[0, 1])
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


@pipeline_def
def file_pipeline(files: list[str], size: int) -> DataNode:
    """DALI's own reader: files in a random order -> uint8 [size, size, 3], the middle of a bicubic resize."""
    data, _ = fn.readers.file(files=files, random_shuffle=True, initial_fill=4 * 64)
    images = fn.decoders.image(data, device="cpu", output_type=types.RGB)
    images = fn.resize(images, resize_shorter=size, interp_type=types.INTERP_CUBIC, antialias=True)
    return fn.crop(images, crop=(size, size))
