"""What a scan says of a data set, and of a packed folder."""

import io
import json
import os

import numpy as np
import pytest
from PIL import Image

from pixelgen_fast.data import each
from pixelgen_fast.data.pack import pack
from pixelgen_fast.data.scan import scan


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


def test_processes_say_what_one_says(mixed):
    assert scan(mixed, workers=2) == scan(mixed, workers=0)
    with pytest.raises(ValueError, match="workers -1 must be at least 0"):
        scan(mixed, workers=-1)


def test_tasks_of_any_size_give_every_image_once(small_tree, monkeypatch):
    for most in (1, 4, 11, 100):
        monkeypatch.setattr(each, "_MOST", most)
        assert scan(small_tree).formats == {"PNG": 11}


@pytest.fixture
def packed(mixed, tmp_path):
    pack(mixed, tmp_path / "packed", 16)
    return tmp_path / "packed"


def test_a_damaged_pixel_is_found_in_its_image(packed):
    assert "labels.npy, checksums.npy, classes.json are as packed" in scan(packed).checksums
    with open(packed / "images.npy", "r+b") as file:
        file.seek(-16 * 16 * 3 - 1, os.SEEK_END)  # the last byte of the last but one of three
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([last ^ 1]))
    assert list(scan(packed).unreadable) == [f"{packed}/images.npy[1]"]


def test_a_damaged_label_is_found(packed):
    np.save(packed / "labels.npy", np.array([0, 1, 1]))
    report = scan(packed)
    assert report.checksums.startswith("labels.npy differ from what was packed") and not report.unreadable
    assert any("labels.npy differ" in line for line in report.lines())


def test_a_folder_of_an_earlier_version_is_read_without_checksums(packed):
    for name in ("manifest.json", "checksums.npy"):
        (packed / name).unlink()
    report = scan(packed)
    assert report.images == 3 and not report.unreadable and report.checksums.startswith("none: an earlier version")


@pytest.mark.parametrize("content", [b"", b"[]", b'{"made": {}}', b"\xff"])
def test_a_damaged_manifest_is_named(packed, content):
    (packed / "manifest.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"manifest\.json is damaged"):
        scan(packed)
