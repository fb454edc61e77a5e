"""Write a data set in the packed form: every image cropped once to S x S, by several processes, again after a kill.

    out/images.npy     uint8 [N, S, S, 3]         out/labels.npy    int64 [N]
    out/checksums.npy  uint32 [N]                 out/classes.json  out/manifest.json

S * S * 3 bytes an image (197 kB at 256 pixels), which trains without decoding; the crop is centre_crop of crop.py. The
files are the same for any number of processes, and for a pack that was killed: processes give pixels, and one writes
them in the order of the source. What is being written is progress.py's; `out` appears whole or not at all.
"""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from PIL import Image, ImageOps

from pixelgen_fast import errors
from pixelgen_fast.data.crop import centre_crop
from pixelgen_fast.data.each import each
from pixelgen_fast.data.encoded import is_turned, load, to_rgb
from pixelgen_fast.data.index import open_index
from pixelgen_fast.data.manifest import Made, Manifest
from pixelgen_fast.data.progress import Progress, part_of, sealed
from pixelgen_fast.errors import InputError

CROPS = ("adm", "squash")
_log = logging.getLogger(__name__)


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


def pack(
    root: str | Path,
    out: str | Path,
    size: int,
    crop: str = "adm",
    *,
    upright: bool = False,
    workers: int | None = None,
) -> PackReport:
    """Write the images below `root` as a packed folder `out` of size x size pixels, or go on with what was killed.

    crop: "adm", or "squash" to resize both sides without regard to the shape. upright: apply EXIF orientation first.
    workers: as `each` takes them. Unreadable images are left out and logged. What is finished already is only reported.
    Raises ValueError for a bad size or crop, when no image is readable, or when what was killed was another pack;
    FileExistsError when out is something else; OSError when the disk has not room for all images, before any work;
    what open_index and `each` raise.
    """
    out = Path(out).expanduser().absolute()
    if size < 1:
        raise InputError(f"size {size} must be at least 1")
    if crop not in CROPS:
        raise InputError(f"crop {crop!r} is none of {', '.join(CROPS)}")
    index = open_index(root)
    made = Made(index.fingerprint, size, crop, upright)
    if out.exists():
        return _finished(out, made)
    _check_room(out, len(index), size)
    with Progress(out, index, made) as progress:
        errors.begin()
        if not progress.complete:
            work = partial(_cropped, size, crop, upright)
            for i, pixels in each(
                index, work, start=progress.done, workers=workers, result_bytes=size * size * 3, title=f"pack {size} px"
            ):
                if isinstance(pixels, str):
                    _log.warning("left out %s: %s", index.path(i), pixels)
                progress.add(i, pixels)
        manifest = progress.publish()
    return _report(out, manifest)


def _finished(out: Path, made: Made) -> PackReport:
    """The report of a folder that is what is asked for."""
    manifest = Manifest.read(out) if out.is_dir() else None
    if manifest is None or manifest.made != made:
        raise FileExistsError(f"{out} exists: choose another folder, or remove it")
    return _report(out, manifest)


def _report(out: Path, manifest: Manifest) -> PackReport:
    return PackReport(str(out), manifest.images, manifest.classes, manifest.made.size, manifest.unreadable)


def _check_room(out: Path, images: int, size: int) -> None:
    """Raise OSError where the disk has not room for what is missing."""
    out.parent.mkdir(parents=True, exist_ok=True)
    there = sum(file.stat().st_size for file in part_of(out).glob("images.*"))
    needed, free = images * size * size * 3 - there, shutil.disk_usage(out.parent).free
    if needed > free:
        raise OSError(f"{out} needs {needed / 1e9:.1f} GB for {images:,} images, but {free / 1e9:.1f} GB are free")


def _cropped(size: int, crop: str, upright: bool, i: int, data: bytes) -> bytes:
    """The pixels of an image with their checksum. Raises UnreadableImage."""
    image = load(data)
    image = to_rgb(ImageOps.exif_transpose(image) if upright and is_turned(image) else image)
    image = centre_crop(image, size) if crop == "adm" else image.resize((size, size), Image.Resampling.BICUBIC)
    return sealed(image.tobytes())
