"""The header of a JPEG image as PIL reads it."""

import io

import numpy as np
import pytest
from PIL import Image

from pixelgen_fast.data.encoded import UnreadableImage, _jpeg_header, inspect


def jpeg(mode="RGB", height=37, width=53, **options) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, "JPEG", **options)
    return file.getvalue()


EXIF = Image.Exif()
EXIF[0x010E] = "x" * 30_000
FORMS = {
    "plain": jpeg(),
    "progressive": jpeg(progressive=True),
    "optimised": jpeg(optimize=True, quality=98, subsampling=0),
    "grey": jpeg("L"),
    "tall": jpeg(height=300, width=1),
    "exif": jpeg(exif=EXIF),
    "thumbnail": jpeg(exif=b"Exif\0\0" + jpeg(height=5)),
    "profile": jpeg(icc_profile=bytes(100_000)),
    "comment": jpeg(comment=b"\xff\xc0 no frame \xff\xd8"),
    "restarts": jpeg(restart_marker_rows=1),
}


@pytest.mark.parametrize("name", FORMS)
def test_a_header_is_what_pil_says(name):
    data = FORMS[name]
    image = Image.open(io.BytesIO(data))
    assert _jpeg_header(data) == (image.format, image.mode, image.height, image.width, True) == inspect(data)


@pytest.mark.parametrize(
    "data",
    [
        jpeg("CMYK"),
        FORMS["plain"].replace(b"\x08\x00\x25\x00\x35\x03", b"\x0c\x00\x25\x00\x35\x03"),  # 12 bits
        FORMS["plain"].replace(b"\x08\x00\x25\x00\x35\x03", b"\x08\x00\x00\x00\x35\x03"),  # a height of 0
        b"\xff\xd8\xff\xe2\x00\x08MPF\0zz" + FORMS["plain"][2:],
        b"\xff\xd8" + b"\xff\xe0\x00\x02" * 101 + FORMS["plain"][2:],
        b"\x89PNG\r\n\x1a\n",
        b"\xff\xd8\xff\xe0\x00\x01",
        b"\xff\xd8\xff\xda",
    ],
)
def test_what_is_not_plain_is_left_to_pil(data):
    assert _jpeg_header(data) is None


def test_any_beginning_has_the_header_or_none():
    data = FORMS["comment"]
    whole = _jpeg_header(data)
    for end in range(len(data)):
        assert _jpeg_header(data[:end]) in (None, whole)
        with pytest.raises(UnreadableImage):
            inspect(data[:end])


def test_an_end_in_the_middle_is_found_as_before():
    assert inspect(FORMS["plain"] + b"a clip behind it").direct
    with pytest.raises(UnreadableImage, match="its end is missing"):
        inspect(FORMS["thumbnail"][:-1])
