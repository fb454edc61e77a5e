import io
import json
import shutil
from collections import namedtuple

import numpy as np
import pytest
from PIL import Image

from pixelgen_fast.data.crop import centre_crop
from pixelgen_fast.data.index import open_index
from pixelgen_fast.data.tools import pack, scan


@pytest.fixture
def mixed(tmp_path, make_photo):
    """Two readable and two unreadable images in class a, one sideways in b."""
    root = tmp_path / "mixed"
    (root / "a").mkdir(parents=True)
    (root / "b").mkdir()
    Image.fromarray(make_photo(40, 60)).save(root / "a" / "1.png")
    Image.fromarray(make_photo(300, 260, 1)).convert("L").save(root / "a" / "2.jpg")
    (root / "a" / "3.jpg").write_bytes((root / "a" / "2.jpg").read_bytes()[:5000])
    (root / "a" / "4.webp").write_bytes(b"")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(make_photo(49, 30, 2)).save(root / "b" / "5.webp", lossless=True, exif=exif)
    return root


def test_scan_reports_what_is_there(mixed, tmp_path):
    report = scan(mixed, out=tmp_path / "report.json")
    assert report.images == 5
    assert report.classes == {"a": 4, "b": 1}
    assert report.formats == {"PNG": 1, "JPEG": 1, "WEBP": 1}
    assert report.modes == {"RGB": 2, "L": 1}
    assert report.shorter_side == {"below 32": 1, "32 to 63": 1, "256 to 511": 1}
    assert report.turned == 1
    assert report.unreadable == {
        str(mixed / "a" / "3.jpg"): "truncated JPEG: its end is missing after 5,000 bytes",
        str(mixed / "a" / "4.webp"): "the file is empty (0 bytes)",
    }
    stored = json.loads((tmp_path / "report.json").read_text())
    assert stored["unreadable"] == report.unreadable and stored["classes"] == report.classes
    assert any("3.jpg: truncated" in line for line in report.lines())


def test_what_lies_behind_the_end_of_a_jpeg_is_none_of_it(tmp_path, make_photo):
    """A phone's clip, and a second image that was cut off; with a thumbnail inside, a cut image is still found."""

    def jpeg(seed, **options):
        file = io.BytesIO()
        Image.fromarray(make_photo(90, 120, seed)).save(file, "JPEG", quality=95, **options)
        return file.getvalue()

    thumbnail = b"Exif\0\0" + jpeg(4)
    (tmp_path / "clip.jpg").write_bytes(jpeg(1) + b"ftypmp42" + bytes(5000) + b"\xff\xda" + bytes(40))
    (tmp_path / "second.jpg").write_bytes(jpeg(2) + jpeg(3)[:-300])
    (tmp_path / "progressive.jpg").write_bytes(jpeg(2, progressive=True) + b"\xff\xda")
    (tmp_path / "cut.jpg").write_bytes(jpeg(5, exif=thumbnail)[:-300])
    assert list(scan(tmp_path).unreadable) == [str(tmp_path / "cut.jpg")]


@pytest.mark.parametrize(
    "block", [b"Exif\0\0", b"Exif\0\0" + b"\xff\xe1NOTATIFF" * 4, b"Exif\0\0II*\0\xff\xff\xff\xff"]
)
def test_an_exif_block_that_cannot_be_read_turns_nothing(tmp_path, make_photo, block):
    (tmp_path / "in").mkdir()
    Image.fromarray(make_photo(90, 120)).save(tmp_path / "in" / "1.jpg", exif=block)
    report = scan(tmp_path / "in")
    assert report.turned == 0 and not report.unreadable
    assert pack(tmp_path / "in", tmp_path / "out", 32, upright=True).images == 1


@pytest.mark.parametrize("crop", ["adm", "squash"])
def test_packed_images_are_the_cropped_ones(mixed, tmp_path, crop):
    out = tmp_path / "packed" / "32"
    report = pack(mixed, out, 32, crop)
    assert sorted(report.unreadable) == [str(mixed / "a" / "3.jpg"), str(mixed / "a" / "4.webp")]
    assert report.images == 3 and "2 unreadable left out" in str(report)
    index = open_index(out)
    assert index.classes == ["a", "b"] and index.labels.tolist() == [0, 0, 1] and index.size == 32
    stored = np.load(out / "images.npy")
    assert stored.shape == (3, 32, 32, 3) and stored.dtype == np.uint8
    for pixels, name in zip(stored, ("a/1.png", "a/2.jpg", "b/5.webp"), strict=True):
        image = Image.open(mixed / name).convert("RGB")
        expected = centre_crop(image, 32) if crop == "adm" else image.resize((32, 32), Image.Resampling.BICUBIC)
        assert np.array_equal(pixels, np.asarray(expected))
    assert {p.name for p in out.parent.iterdir()} == {"32"}


def test_upright_turns_images_as_their_exif_says(mixed, tmp_path):
    pack(mixed / "b", tmp_path / "flat", 32)
    pack(mixed / "b", tmp_path / "upright", 32, upright=True)
    flat, turned = (np.load(tmp_path / name / "images.npy")[0] for name in ("flat", "upright"))
    # Orientation 6: the first row is the right-hand column, so a quarter turn clockwise sets the image upright.
    assert np.abs(np.rot90(flat, -1).astype(int) - turned).max() <= 1
    assert np.abs(flat.astype(int) - turned).max() > 20


def test_pack_refuses_before_it_works(mixed, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="size 0"):
        pack(mixed, tmp_path / "out", 0)
    with pytest.raises(ValueError, match="'middle' is none of adm, squash"):
        pack(mixed, tmp_path / "out", 32, "middle")
    with pytest.raises(FileExistsError, match="choose another"):
        pack(mixed, mixed, 32)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("Usage", "free")(1000))
    with pytest.raises(OSError, match=r"needs 0\.0 GB for 5 images"):
        pack(mixed, tmp_path / "out", 32)
    assert not (tmp_path / "out").exists()


def test_pack_of_unreadable_images_leaves_nothing(mixed, tmp_path):
    for name in ("a/1.png", "a/2.jpg", "b/5.webp"):
        (mixed / name).write_bytes(b"nothing")
    with pytest.raises(ValueError, match="none of the 5 images"):
        pack(mixed, tmp_path / "out", 32)
    assert {p.name for p in tmp_path.iterdir()} == {"mixed"}
