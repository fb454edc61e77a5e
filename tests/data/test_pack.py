"""Packing: the pixels are the crop's, and the files the same for any number of processes and after any kill."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pixelgen_fast.data import progress
from pixelgen_fast.data.crop import centre_crop
from pixelgen_fast.data.index import open_index
from pixelgen_fast.data.manifest import Made
from pixelgen_fast.data.pack import pack
from pixelgen_fast.data.progress import Progress


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


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


def test_any_number_of_processes_writes_the_same_files(mixed, tmp_path):
    for workers in (0, 1, 3):
        pack(mixed, tmp_path / f"{workers}", 32, workers=workers)
    assert content(tmp_path / "0") == content(tmp_path / "1") == content(tmp_path / "3")


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it."""


class Switch:
    """Raises Killed at call number `at` of whatever it is wrapped around, before it is done."""

    def __init__(self, at: int) -> None:
        self.left = at

    def around(self, call):
        def maybe(*args, **options):
            self.left -= 1
            if self.left == 0:
                raise Killed
            return call(*args, **options)

        return maybe


STAGES = [
    (os, "fsync"), (os, "fdatasync"), (progress.np, "save"), (Path, "rename"), (Path, "unlink"), (Path, "write_text"),
    (Progress, "_note"), (Progress, "_finish"),
]  # fmt: skip


def test_a_pack_killed_at_every_stage_ends_with_the_same_files(mixed, tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "_SYNC_SECONDS", -1.0)
    pack(mixed, tmp_path / "whole", 32)
    expected, out, stage = content(tmp_path / "whole"), tmp_path / "out", 0
    while True:
        stage += 1
        with monkeypatch.context() as patch:
            switch = Switch(stage)
            for place, name in STAGES:
                patch.setattr(place, name, switch.around(getattr(place, name)))
            try:
                pack(mixed, out, 32)
            except Killed:
                assert not out.exists() or content(out) == expected, stage
                (names,) = [{p.name for p in folder.iterdir()} for folder in tmp_path.glob(".out*")] or [set()]
                assert not {"images.npy"} & names or {"labels.npy", "classes.json", "manifest.json"} <= names
            else:
                break
        if stage % 2:  # killed again on the way
            with monkeypatch.context() as patch, suppress(Killed):
                patch.setattr(os, "fsync", Switch(2).around(os.fsync))
                pack(mixed, out, 32)
        pack(mixed, out, 32)
        assert content(out) == expected, stage
        shutil.rmtree(out)
    assert stage > 30 and content(out) == expected
    assert {p.name for p in tmp_path.iterdir()} == {"mixed", "whole", "out"}


def test_what_was_done_is_not_done_again(small_tree, tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "_SYNC_SECONDS", -1.0)
    with monkeypatch.context() as patch:
        patch.setattr(Progress, "add", Switch(8).around(Progress.add))
        with pytest.raises(Killed):
            pack(small_tree, tmp_path / "out", 12)
    for k in range(7):
        next(small_tree.rglob(f"{k:02d}.png")).write_bytes(b"not read again")
    assert pack(small_tree, tmp_path / "out", 12).images == 11
    assert np.load(tmp_path / "out" / "images.npy")[:, 0, 0, 0].tolist() == [20 * k for k in range(11)]


SCRIPT = """
import sys
from pixelgen_fast.data import progress
from pixelgen_fast.data.pack import pack
progress._SYNC_SECONDS = -1.0
pack(sys.argv[1], sys.argv[2], 64, workers=2)
"""


def test_a_killed_process_and_its_workers_leave_what_the_next_goes_on_from(tmp_path, make_photo):
    root, out = tmp_path / "many", tmp_path / "out"
    root.mkdir()
    for k in range(150):
        Image.fromarray(make_photo(90, 110, k % 3)).save(root / f"{k:03d}.png")
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, root, out])
    journal = tmp_path / ".out.part" / "journal.jsonl"
    while process.poll() is None and not (journal.exists() and journal.read_bytes().count(b"\n") > 20):
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert journal.exists() and not out.exists()
    with pytest.raises(ValueError, match="holds no images"):
        open_index(tmp_path / ".out.part")
    pack(root, out, 64, workers=0)
    pack(root, tmp_path / "whole", 64, workers=0)
    assert content(out) == content(tmp_path / "whole")


def test_the_beginning_of_another_pack_is_refused(mixed, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Progress, "add", Switch(3).around(Progress.add))
        with pytest.raises(Killed):
            pack(mixed, tmp_path / "out", 32)
    with pytest.raises(ValueError, match=r"beginning of another pack \(made size 32 -> 16, made crop adm -> squash\)"):
        pack(mixed, tmp_path / "out", 16, "squash")
    monkeypatch.setattr(progress, "decoders", lambda: {"pillow": "0"})
    with pytest.raises(ValueError, match=r"\(decoders pillow \S+ -> 0\): give that command again, or remove"):
        pack(mixed, tmp_path / "out", 32)


def test_two_processes_never_write_one_pack(mixed, tmp_path):
    index = open_index(mixed)
    made = Made(index.fingerprint, 32, "adm", False)
    refused = pytest.raises(ValueError, match="another process is writing")
    with Progress(tmp_path / "out", index, made), refused:
        pack(mixed, tmp_path / "out", 32)
    assert pack(mixed, tmp_path / "out", 32).images == 3


def test_a_finished_pack_is_reported_again_and_another_one_refused(mixed, tmp_path):
    report = pack(mixed, tmp_path / "out", 32)
    assert pack(mixed, tmp_path / "out", 32) == report
    with pytest.raises(FileExistsError, match="choose another"):
        pack(mixed, tmp_path / "out", 16)


def test_a_full_disk_is_one_line_and_the_same_command_goes_on(mixed, tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))
    try:
        with pytest.raises(ValueError, match=r"cannot write .*out: .*the same command goes on"):
            pack(mixed, tmp_path / "out", 32)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert pack(mixed, tmp_path / "out", 32).images == 3


def test_the_manifest_says_how_and_what(mixed, tmp_path):
    pack(mixed, tmp_path / "out", 32, upright=True)
    said = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert said["made"] == {
        "fingerprint": open_index(mixed).fingerprint, "size": 32, "crop": "adm", "upright": True, "version": 1,
    }  # fmt: skip
    assert said["images"] == 3 and said["root"] == str(mixed) and set(said["unreadable"]) == {
        str(mixed / "a" / "3.jpg"), str(mixed / "a" / "4.webp"),
    }  # fmt: skip
    assert said["files"]["classes.json"][0] == (tmp_path / "out" / "classes.json").stat().st_size
