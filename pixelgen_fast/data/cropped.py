"""Single images as training sees them, decoded and cropped by PIL: for sets that are read once, to be judged."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import numpy as np

from pixelgen_fast.data.crop import centre_crop
from pixelgen_fast.data.encoded import UnreadableImage, decode
from pixelgen_fast.data.image_index import ImageIndex
from pixelgen_fast.data.storage import read_bytes
from pixelgen_fast.errors import InputError
from pixelgen_fast.settings import Crop

_THREADS = 8  # that decode; PIL lets go of Python's lock meanwhile
_log = logging.getLogger(__name__)


def read_cropped(index: ImageIndex, i: int, size: int | None, crop: Crop = "adm") -> np.ndarray:
    """Image i, uint8 [size, size, 3]; size None leaves it as it is.

    Raises UnreadableImage, InputError where crop is "none" and its size another one, DataAway and ResourceError.
    """
    image = decode(read_bytes(index, i))
    if size is None or (image.height, image.width) == (size, size):
        return np.array(image)
    if crop == "none":
        raise InputError(
            f"{index.path(i)} has {image.height} x {image.width} pixels, not {size} x {size}: crop 'none' takes images "
            "as they are"
        )
    return np.array(centre_crop(image, size))


def first_readable(
    index: ImageIndex, numbers: Iterable[int], count: int, size: int, crop: Crop
) -> tuple[np.ndarray, np.ndarray]:
    """The first `count` of these images that can be read: their numbers int64 [n], and uint8 [n, size, size, 3].

    Those that cannot are named in a warning. Raises InputError where there are none, and what `read_cropped` raises.
    """
    found = list(islice(_readable(index, iter(numbers), size, crop), count))
    if not found:
        raise InputError(f"no image of {index.root} that is held out can be read: see `pixelgen data scan`")
    return np.array([i for i, _ in found]), np.stack([image for _, image in found])


def _readable(index: ImageIndex, numbers: Iterator[int], size: int, crop: Crop) -> Iterator[tuple[int, np.ndarray]]:
    def read(i: int) -> np.ndarray | None:
        try:
            return read_cropped(index, i, size, crop)
        except UnreadableImage as error:
            _log.warning("unreadable image %s: %s; another one takes its place", index.path(i), error)
            return None

    with ThreadPoolExecutor(_THREADS) as pool:
        while some := list(islice(numbers, _THREADS)):
            yield from ((i, image) for i, image in zip(some, pool.map(read, some), strict=True) if image is not None)
