"""Look through a data set before training on it, and write it in the packed form.

`scan` decodes every image and reports what the loader would replace. `pack` crops every image once to S x S and writes
    images.npy  uint8 [N, S, S, 3]      labels.npy  int64 [N]      classes.json  N class names in label order
S * S * 3 bytes an image (197 kB at 256 pixels), which trains without decoding; the crop is centre_crop of crop.py.
"""

from __future__ import annotations

import json
import logging
import shutil
import struct
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np
from PIL import ExifTags, Image, ImageOps
from tqdm import tqdm

from pixelgen_fast import errors
from pixelgen_fast.data.cache import published_file, published_folder
from pixelgen_fast.data.crop import centre_crop
from pixelgen_fast.data.encoded import UnreadableImage, load, to_rgb
from pixelgen_fast.data.image_index import ImageIndex
from pixelgen_fast.data.index import open_index
from pixelgen_fast.data.storage import patiently, read_bytes
from pixelgen_fast.errors import InputError

CROPS = ("adm", "squash")
_PATIENCE = 60.0  # seconds for which a data root that is away is waited for
_SIDES = (32, 64, 128, 256, 512, 1024, 2048)
_log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass
class ScanReport:
    """What a data set holds.

    classes: name -> images. unreadable: path -> reason. formats, modes: as PIL names them -> readable images.
    shorter_side: "below 64" and so on -> readable images. turned: readable images whose EXIF asks for a rotation or
    mirroring, which neither ADM nor the loader applies.
    """

    root: str
    images: int
    classes: dict[str, int]
    unreadable: dict[str, str] = field(default_factory=dict)
    formats: dict[str, int] = field(default_factory=dict)
    modes: dict[str, int] = field(default_factory=dict)
    shorter_side: dict[str, int] = field(default_factory=dict)
    turned: int = 0

    def lines(self) -> list[str]:
        """The report in words, one line each."""
        bad = [f"    {path}: {reason}" for path, reason in self.unreadable.items()]
        counts = sorted(self.classes.values())
        return [
            f"{self.root}: {self.images:,} images in {len(self.classes):,} classes "
            f"({counts[0]:,} to {counts[-1]:,} a class), {len(bad):,} unreadable",
            *bad,
            "formats         " + _counts(self.formats),
            "colour modes    " + _counts(self.modes),
            "shorter side    " + _counts(self.shorter_side),
            f"EXIF rotation   {self.turned:,} images (not applied in training; `data pack --upright` does)",
        ]


@dataclass(frozen=True)
class PackReport:
    """What `pack` wrote. unreadable: path -> reason of the images left out."""

    out: str
    images: int
    classes: int
    size: int
    unreadable: dict[str, str]

    def __str__(self) -> str:
        left_out = f", {len(self.unreadable):,} unreadable left out" if self.unreadable else ""
        return (
            f"{self.out}: {self.images:,} images of {self.size} x {self.size} pixels in {self.classes:,} classes"
            f"{left_out}. Train on it with data.root={self.out} data.image_size={self.size}"
        )


def scan(root: str | Path, *, out: str | Path | None = None, threads: int = 2) -> ScanReport:
    """Decode every image below `root` (anything `open_index` takes) and report; write the report as JSON to `out`.

    Raises what open_index raises.
    """
    index = open_index(root)
    counts = np.bincount(index.labels, minlength=len(index.classes)).tolist()
    report = ScanReport(str(index.root), len(index), dict(zip(index.classes, counts, strict=True)))
    formats: Counter[str] = Counter()
    modes: Counter[str] = Counter()
    sides: Counter[str] = Counter()
    for i, seen in enumerate(_mapped(partial(_look, index), len(index), threads, "scan")):
        if isinstance(seen, str):
            report.unreadable[index.path(i)] = seen
            continue
        format, mode, side, turned = seen
        formats[format] += 1
        modes[mode] += 1
        sides[side] += 1
        report.turned += turned
    report.formats, report.modes = dict(formats.most_common()), dict(modes.most_common())
    report.shorter_side = {name: sides[name] for name in _side_names() if sides[name]}
    if out is not None:
        with published_file(Path(out)) as work:
            work.write_text(json.dumps(asdict(report), indent=2) + "\n")
    return report


def _write_images(
    path: Path, index: ImageIndex, size: int, images: Iterable[bytes | str]
) -> tuple[list[int], dict[str, str]]:
    """Write one array of the images that are pixels. Returns their labels, and why each of the others is not."""
    unreadable: dict[str, str] = {}
    labels: list[int] = []
    with open(path, "wb") as file:
        _write_header(file, len(index), size)
        for i, pixels in enumerate(images):
            if isinstance(pixels, str):
                unreadable[index.path(i)] = pixels
                _log.warning("left out %s: %s", index.path(i), pixels)
            else:
                file.write(pixels)
                labels.append(index.label(i))
        if not labels:
            raise InputError(f"none of the {len(index):,} images of {index.root} is readable: {_first(unreadable)}")
        _write_header(file, len(labels), size)
    return labels, unreadable


def pack(
    root: str | Path, out: str | Path, size: int, crop: str = "adm", *, upright: bool = False, threads: int = 2
) -> PackReport:
    """Write the images below `root` as a packed folder `out` of size x size pixels, whole or not at all.

    crop: "adm", or "squash" to resize both sides without regard to the shape. upright: apply EXIF orientation first.
    Unreadable images are left out and logged.
    Raises ValueError for a bad size or crop, or when no image is readable; FileExistsError when out exists; OSError
    when the disk has not room for all images, before any work.
    """
    out = Path(out).expanduser().absolute()
    if size < 1:
        raise InputError(f"size {size} must be at least 1")
    if crop not in CROPS:
        raise InputError(f"crop {crop!r} is none of {', '.join(CROPS)}")
    if out.exists():
        raise FileExistsError(f"{out} exists: choose another folder, or remove it")
    index = open_index(root)
    out.parent.mkdir(parents=True, exist_ok=True)
    needed, free = len(index) * size * size * 3, shutil.disk_usage(out.parent).free
    if needed > free:
        raise OSError(f"{out} needs {needed / 1e9:.1f} GB for {len(index):,} images, but {free / 1e9:.1f} GB are free")
    errors.begin()
    with published_folder(out) as folder:
        one = partial(_cropped, index, size, crop, upright)
        pixels = _mapped(one, len(index), threads, f"pack {size} px")
        labels, unreadable = _write_images(folder / "images.npy", index, size, pixels)
        np.save(folder / "labels.npy", np.array(labels, dtype=np.int64))
        (folder / "classes.json").write_text(json.dumps(index.classes) + "\n")
    return PackReport(str(out), len(labels), len(index.classes), size, unreadable)


def _write_header(file: BinaryIO, count: int, size: int) -> None:
    """The .npy header of uint8 [count, size, size, 3] at the file's start; its length does not depend on count."""
    file.seek(0)
    np.lib.format.write_array_header_1_0(
        file, {"descr": "|u1", "fortran_order": False, "shape": (count, size, size, 3)}
    )


def _cropped(index: ImageIndex, size: int, crop: str, upright: bool, i: int) -> bytes | str:
    """The pixels of image i, or the reason why there are none."""
    try:
        image = load(patiently(partial(read_bytes, index, i), _PATIENCE))
    except UnreadableImage as error:
        return str(error)
    image = to_rgb(ImageOps.exif_transpose(image) if upright and _turned(image) else image)
    image = centre_crop(image, size) if crop == "adm" else image.resize((size, size), Image.Resampling.BICUBIC)
    return image.tobytes()


def _look(index: ImageIndex, i: int) -> tuple[str, str, str, bool] | str:
    """(format, mode, shorter side, asks for rotation) of image i, or the reason why it is unreadable."""
    try:
        image = load(patiently(partial(read_bytes, index, i), _PATIENCE))
    except UnreadableImage as error:
        return str(error)
    side = _side_names()[sum(min(image.size) >= edge for edge in _SIDES)]
    return str(image.format), image.mode, side, _turned(image)


def _turned(image: Image.Image) -> bool:
    """Whether an image asks to be rotated or mirrored; one whose EXIF block cannot be read does not."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1) != 1
    except (OSError, SyntaxError, ValueError, KeyError, TypeError, struct.error):
        return False


def _side_names() -> list[str]:
    return [f"below {_SIDES[0]}"] + [f"{low} to {high - 1}" for low, high in pairwise(_SIDES)] + [f"from {_SIDES[-1]}"]


def _mapped(one: Callable[[int], T], count: int, threads: int, title: str) -> Iterator[T]:
    """one(0), one(1), ... in order, computed a little ahead by threads (PIL decodes outside Python's lock)."""
    with ThreadPoolExecutor(threads) as pool, tqdm(total=count, desc=title, unit="img", disable=None) as bar:
        ahead = deque(pool.submit(one, i) for i in range(min(4 * threads, count)))
        for i in range(count):
            if (later := i + 4 * threads) < count:
                ahead.append(pool.submit(one, later))
            yield ahead.popleft().result()
            bar.update()


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name}: {count:,}" for name, count in counts.items()) or "none"


def _first(unreadable: dict[str, str]) -> str:
    path, reason = next(iter(unreadable.items()))
    return f"{path}: {reason}"
