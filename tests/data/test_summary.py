"""What `data index` says of each kind of root, against what was put there."""

import hashlib
import json
import os
import tarfile

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from pixelgen_fast.cli import main
from pixelgen_fast.data import image_index
from pixelgen_fast.data.image_index import Names
from pixelgen_fast.data.index import open_index
from pixelgen_fast.data.pack import pack
from pixelgen_fast.data.summary import summarise


@pytest.fixture(params=["folder", "tar", "tars", "parquet", "parquets", "packed"])
def root(request, small_tree, tmp_path, monkeypatch):
    """The eleven images in each form."""
    monkeypatch.setenv("PIXELGEN_CACHE", str(tmp_path / "cache"))
    target, kind = tmp_path / "root", request.param
    images = sorted(small_tree.rglob("*.png"))
    if kind == "folder":
        return small_tree
    if kind == "packed":
        pack(small_tree, target, 12)
        return target
    many = kind.endswith("s")
    target = target if many else tmp_path / f"root.{kind}"
    if many:
        target.mkdir()
    for k, part in enumerate((images[:5], images[5:]) if many else (images,)):
        file = target / f"{k}.{kind.rstrip('s')}" if many else target
        if kind.startswith("tar"):
            with tarfile.open(file, "w") as archive:
                for image in part:
                    archive.add(image, f"{image.parent.name}/{image.name}")
        else:
            table = {"image": [p.read_bytes() for p in part], "label": [int(p.parent.name == "b") for p in part]}
            parquet.write_table(pa.table(table), file, row_group_size=2)
    return target


def test_a_fingerprint_is_that_of_all_paths_below_the_root(root):
    index = open_index(root)
    digest = hashlib.sha256(json.dumps([11, index.size, index.classes]).encode())
    digest.update(np.array([0] * 4 + [1] * 7).tobytes())
    for i in range(11):
        digest.update(index.path(i)[len(str(root)) :].encode())
    assert index.fingerprint == digest.hexdigest()


def test_names_come_in_pieces_of_any_size(monkeypatch):
    names = ["a", "", "ü/b", "c" * 50, "\udcff"]
    for most in (1, 2, 3, 5, 6):
        monkeypatch.setattr(image_index, "_AT_ONCE", most)
        assert [os.fsdecode(name) for name in Names(names).encoded()] == names
    assert [*Names([]).encoded()] == []


def test_a_summary_counts_what_is_there(root, small_tree):
    found = summarise(str(root))
    assert (found.images, found.classes) == (11, 2)
    encoded = sum(file.stat().st_size for file in small_tree.rglob("*.png"))
    shards = sum(file.stat().st_size for file in (root.rglob("*") if root.is_dir() else [root]))
    expected = {"a packed folder": 11 * 12 * 12 * 3, "Parquet files": shards}.get(found.kind, encoded)
    assert found.bytes == expected
    assert found.memory >= 8 * 11 and found.seconds > 0
    assert (found.kept is not None) == (found.kind == "tar files") == (found.again is not None)
    if found.kept:
        assert found.kept.exists() and "a run opens it in" in found.lines()[-1]


def test_memory_of_the_index_is_what_its_arrays_take(tmp_path):
    """An image more costs its label, its name and where the name ends."""
    memory = []
    for count in (500, 1500):
        (tmp_path / "a").mkdir(exist_ok=True)
        for k in range(count):
            (tmp_path / "a" / f"{k:05d}.png").touch()
        memory.append(summarise(str(tmp_path)).memory)
    assert memory[1] - memory[0] == pytest.approx(1000 * (8 + 8 + len("a/00000.png")), abs=100)


def test_the_command_says_it(small_tree, capsys):
    assert main(["data", "index", str(small_tree)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith(f"{small_tree}: a folder of images, 11 images in 2 classes, 0.000 GB")
    assert main(["data", "index", "digits"]) == 0
    assert "1,797 images in 10 classes" in capsys.readouterr().out
    assert main(["data", "index", str(small_tree / "none")]) == 2
    assert "does not exist" in capsys.readouterr().err
