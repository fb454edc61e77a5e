"""What the encoded bytes of one image say about it, before anything is decoded.

`inspect` reads the header (a few tens of microseconds) and refuses bytes that cannot be a whole image: the loader then
needs no failed decode to find out. A file is truncated when its format's end is missing:
    JPEG  no end-of-image marker (FF D9) behind its scans; what lies behind the end, as phones put clips there, is none
          of the image
    PNG   no IEND chunk
    WebP  fewer bytes than the RIFF header promises
`to_rgb` fixes what every image becomes: 8-bit RGB; alpha and transparency are dropped, not blended; 16-bit
channels keep their high byte (PIL's own conversion would clip grey to white); CMYK and palettes as PIL converts them;
colour profiles ignored.

An image of more than 512 million pixels, 1.5 GB once decoded, is refused before that; PIXELGEN_MAX_PIXELS in the
environment sets another limit.
"""

from __future__ import annotations

import io
import os
import re
import struct
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image

from pixelgen_fast.errors import InputError

_DIRECT_FORMATS = {"JPEG", "MPO", "PNG", "WEBP", "PPM"}
_DIRECT_MODES = {"1", "L", "LA", "P", "RGB", "RGBA"}
_PNG_DEPTH = 24  # where IHDR, always the first chunk, has the bits per channel
_START_OF_SCAN, _END_OF_IMAGE = b"\xff\xda", b"\xff\xd9"
# segments of a JPEG image that may come before its frame: applications, comments, tables
_BEFORE_FRAME = {bytes([kind]) for kind in (*range(0xE0, 0xF0), 0xFE, 0xDB, 0xC4, 0xDD)}
_MOST_SEGMENTS = 100
_MARKER = re.compile(rb"\xff+[^\x00\xd0-\xd7\xff]", re.DOTALL)  # one that stands in no scan's data
_WHAT_PIL_RAISES = (OSError, SyntaxError, ValueError, EOFError)
_MOST_PIXELS, _LIMIT = 512_000_000, "PIXELGEN_MAX_PIXELS"
Image.MAX_IMAGE_PIXELS = None  # PIL's own limit, 179 million, is passed by sound scans and maps


class UnreadableImage(InputError):
    """The bytes are not a whole image; the message is the reason, without the path."""


class Header(NamedTuple):
    """format and mode as PIL names them. direct: a decoder may take the bytes as they are; if not, convert with PIL."""

    format: str
    mode: str
    height: int
    width: int
    direct: bool


def inspect(data: bytes) -> Header:
    """Read the header of an encoded image and check that its end is there. Raises UnreadableImage with the reason."""
    if not data:
        raise UnreadableImage("the file is empty (0 bytes)")
    if header := _jpeg_header(data):
        _check_pixels(header.width, header.height)
        _check_end(data, header.format)
        return header
    image = _open(data)
    _check_end(data, image.format)
    still = image.format == "MPO" or not getattr(image, "is_animated", False)
    eight_bit = image.format != "PNG" or data[_PNG_DEPTH] <= 8
    direct = image.format in _DIRECT_FORMATS and image.mode in _DIRECT_MODES and still and eight_bit
    return Header(image.format, image.mode, image.height, image.width, direct)


def load(data: bytes) -> Image.Image:
    """Decode all pixels with PIL in the image's own mode. Raises UnreadableImage with the reason."""
    inspect(data)
    image = _open(data)
    try:
        image.load()
    except _WHAT_PIL_RAISES as error:
        raise UnreadableImage(f"{image.format} data do not decode: {error}") from error
    return image


def decode(data: bytes) -> Image.Image:
    """Decode all pixels with PIL, to mode RGB by the rules above. Raises UnreadableImage with the reason."""
    return to_rgb(load(data))


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL image as mode RGB: alpha dropped, 16-bit grey reduced to its high byte, the rest as PIL converts it."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8))
    return image.convert("RGB")


def is_turned(image: Image.Image) -> bool:
    """Whether an image asks to be rotated or mirrored; one whose EXIF block cannot be read does not."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1) != 1
    except (OSError, SyntaxError, ValueError, KeyError, TypeError, struct.error):
        return False


def as_ppm(image: Image.Image) -> bytes:
    """An RGB image as binary PPM: uncompressed and lossless, and every decoder reads it."""
    return ppm(image.height, image.width, image.tobytes())


def ppm(height: int, width: int, pixels: bytes) -> bytes:
    """Binary PPM from height * width * 3 bytes in row order."""
    return b"P6\n%d %d\n255\n" % (width, height) + pixels


def _open(data: bytes) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data))
    except Image.UnidentifiedImageError as error:
        raise UnreadableImage(f"not an image: begins with {data[:12]!r}") from error
    except _WHAT_PIL_RAISES as error:
        raise UnreadableImage(str(error)) from error
    _check_pixels(image.width, image.height)
    return image


def _check_pixels(width: int, height: int) -> None:
    if width * height > (most := most_pixels()):
        raise UnreadableImage(f"{width} x {height} pixels are more than {most:,}, the limit; {_LIMIT} sets another one")


def most_pixels() -> int:
    """Pixels of an image above which it counts as unreadable. Raises InputError for a limit that is no number."""
    given = os.environ.get(_LIMIT)
    if given is not None and not given.isdecimal():
        raise InputError(f"{_LIMIT}={given!r} in the environment is no number of pixels")
    return _MOST_PIXELS if given is None else int(given)


def _jpeg_header(data: bytes) -> Header | None:
    """The header of a grey or colour JPEG image in a tenth of PIL's time; None for what PIL had better look at."""
    if data[:3] != b"\xff\xd8\xff":
        return None
    at = 2
    for _ in range(_MOST_SEGMENTS):
        start, kind, length = data[at : at + 1], data[at + 1 : at + 2], int.from_bytes(data[at + 2 : at + 4], "big")
        if start != b"\xff" or data[at + 4 : at + 8] == b"MPF\0":
            return None
        if kind in (b"\xc0", b"\xc1", b"\xc2"):  # a frame: bits, height, width, components (ITU-T T.81, B.2.2)
            bits, *sides, components = struct.unpack(">BHHB", data[at + 4 : at + 10].ljust(6, b"\0"))
            mode = {1: "L", 3: "RGB"}.get(components)
            return Header("JPEG", mode, *sides, direct=True) if mode and bits == 8 and min(sides) > 0 else None
        if kind not in _BEFORE_FRAME or length < 2:
            return None
        at += 2 + length
    return None


def _jpeg_ends(data: bytes) -> bool:
    """Whether the first image of the bytes has its end, segment by segment (ITU-T T.81, B.1.1)."""
    at = 2
    while marker := _MARKER.search(data, at):
        if data[marker.end() - 1] == _END_OF_IMAGE[1]:
            return True
        at = marker.end() + int.from_bytes(data[marker.end() : marker.end() + 2], "big")
    return False


def _check_end(data: bytes, format: str | None) -> None:
    if format in ("JPEG", "MPO"):
        whole = (
            data.endswith(_END_OF_IMAGE) or data.rfind(_END_OF_IMAGE) > data.rfind(_START_OF_SCAN) or _jpeg_ends(data)
        )
    elif format == "PNG":
        whole = data.rfind(b"IEND") >= 0
    elif format == "WEBP":
        whole = len(data) >= int.from_bytes(data[4:8], "little") + 8
    else:
        whole = True
    if not whole:
        raise UnreadableImage(f"truncated {format}: its end is missing after {len(data):,} bytes")
