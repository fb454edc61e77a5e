"""Parquet files as Hugging Face's hub holds images."""

import json
import os
import pickle
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from pixelgen_fast.config import Data
from pixelgen_fast.data.dali import Loader
from pixelgen_fast.data.index import open_index
from pixelgen_fast.data.order import Order
from pixelgen_fast.data.pack import pack
from pixelgen_fast.data.parquet import ParquetIndex, _Kept
from pixelgen_fast.data.scan import scan
from pixelgen_fast.data.storage import DataAway, read_bytes

STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def write(path, images, labels, classes=None, rows=2, kind=STRUCT):
    """One file of row groups of `rows` images."""
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": classes}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})} if classes else None
    if kind == STRUCT:
        images = [{"bytes": data, "path": f"{k}.png"} for k, data in enumerate(images)]
    schema = pa.schema([("image", kind), ("label", pa.int64())], metadata)
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.table({"image": images, "label": labels}, schema), path, row_group_size=rows)
    return path


def content(index) -> list[tuple[bytes, int]]:
    return [(index.read(i), index.label(i)) for i in range(len(index))]


@pytest.fixture
def folder(small_tree):
    return open_index(small_tree)


@pytest.fixture
def shards(folder, tmp_path):
    """The images of `folder` in three files of row groups of two, the second file empty."""
    root = tmp_path / "shards"
    for k, (begin, end) in enumerate([(0, 5), (5, 5), (5, 11)]):
        images = [folder.read(i) for i in range(begin, end)]
        write(root / f"data/train-{k:05d}-of-00003.parquet", images, folder.labels[begin:end], folder.classes)
    return root


def test_the_shards_of_a_tree_hold_the_same_in_the_same_order(folder, shards):
    index = open_index(shards)
    assert isinstance(index, ParquetIndex)
    assert content(index) == content(folder) and index.classes == folder.classes
    last = shards / "data" / "train-00002-of-00003.parquet"
    assert (
        index.path(10) == f"{last}[5]"
        and index.holder(5) == last
        and index.path(4).endswith("00000-of-00003.parquet[4]")
    )
    assert index.fingerprint == open_index(shards).fingerprint != open_index(last).fingerprint
    assert content(open_index(shards / "data")) == content(folder)
    assert content(open_index(last)) == content(folder)[5:]


def test_an_index_travels_without_what_it_holds_open(folder, shards):
    index = open_index(shards)
    index.read(0)
    assert len(pickle.dumps(index)) < 3000
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        assert pool.submit(index.read, 7).result() == folder.read(7)


def test_batches_are_those_of_the_folder(folder, shards):
    settings = Data(image_size=8, workers=1, threads=1)
    order = Order(seed=3, global_batch=4, micro_batch=4)
    with Loader(folder, order, settings) as here, Loader(open_index(shards), order, settings) as there:
        for _ in range(4):
            expected, batch = next(here), next(there)
            assert np.array_equal(expected.images, batch.images) and np.array_equal(expected.labels, batch.labels)


def test_shards_are_scanned_and_packed(folder, shards, tmp_path):
    assert scan(shards).classes == {"a": 4, "b": 7}
    pack(shards, tmp_path / "packed", 12)
    packed = open_index(tmp_path / "packed")
    assert packed.labels.tolist() == folder.labels.tolist() and packed.classes == ["a", "b"]
    assert np.load(tmp_path / "packed" / "images.npy")[:, 0, 0, 0].tolist() == [20 * k for k in range(11)]


def test_bytes_straight_and_classes_without_names(tmp_path):
    for kind in (pa.binary(), pa.large_binary()):
        write(tmp_path / "x.parquet", [b"A", b"B", None], [2, 0, 1], kind=kind)
        index = open_index(tmp_path)
        assert index.classes == ["class 0", "class 1", "class 2"] and index.labels.tolist() == [2, 0, 1]
        assert [index.read(1), index.read(0)] == [b"B", b"A"]
        with pytest.raises(OSError, match=r"x.parquet\[2\] has no bytes"):
            index.read(2)


def test_row_groups_are_decoded_once_and_kept_within_bounds(shards, monkeypatch):
    index = open_index(shards)
    decoded = []
    images = index._images
    monkeypatch.setattr(index, "_images", lambda group: decoded.append(group) or images(group))
    content(index)
    content(index)
    assert decoded == [0, 1, 2, 4, 5, 6]  # 3 is empty
    decoded.clear()
    index._kept = _Kept(1)
    content(index)
    index.read(0)
    assert decoded == [0, 1, 2, 4, 5, 6, 0] and len(index._kept._made) == 1


def test_damaged_files_are_named_in_one_line(shards):
    index = open_index(shards)
    first, _, last = sorted((shards / "data").iterdir())
    good = last.read_bytes()
    last.write_bytes(good[:4] + b"\xff" * 60 + good[64:])
    with pytest.raises(OSError, match=f"^{last} is no Parquet file, or is damaged or cut short: [^\n]+$"):
        index.read(5)
    os.truncate(last, len(good) // 2)
    with pytest.raises(ValueError, match=f"{last} is not the file that was opened: it has .* bytes, and had"):
        read_bytes(index, 5)
    for data in (good[: len(good) // 2], b"", b"version https://git-lfs.github.com/spec/v1\n"):
        last.write_bytes(data)
        with pytest.raises(ValueError, match=f"^{last} is no Parquet file, or is damaged or cut short: [^\n]+$"):
            open_index(shards)
    assert index.read(0) and index.holder(0) == first


def test_shards_that_are_away_are_no_damage(shards):
    index = open_index(shards)
    index.read(0)
    shards.rename(shards.with_name("elsewhere"))
    assert index.read(1)  # of the row group that is kept
    with pytest.raises(DataAway, match=f"data root {shards} is away"):
        read_bytes(index, 5)


def test_files_of_other_columns_are_refused(tmp_path):
    columns = {"img": [b"A"], "label": [0], "image": ["text"]}
    parquet.write_table(pa.table(columns), tmp_path / "x.parquet")
    with pytest.raises(
        ValueError, match=r"x.parquet has the columns img \(binary\), label \(int64\), image \(string\)"
    ):
        open_index(tmp_path)
    parquet.write_table(pa.table({"image": [b"A"], "label": ["cat"]}), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match="and label, an integer"):
        open_index(tmp_path)


@pytest.mark.parametrize(
    "labels, classes, message",
    [
        ([], None, "its Parquet files have no rows"),
        ([0, -1], None, r"x.parquet: 1 of 2 images have no label, .* \(first: row 1\)"),
        ([0, None], None, "1 of 2 images have no label"),
        ([0, 10**12], None, "x.parquet: label 1,000,000,000,000 is beyond 1,000,000"),
        ([0, 2], ["cat", "dog"], "labels up to 2, and names of 2 classes"),
    ],
)
def test_labels_without_a_class_are_refused(tmp_path, labels, classes, message):
    write(tmp_path / "x.parquet", [b"A"] * len(labels), labels, classes)
    with pytest.raises(ValueError, match=message):
        open_index(tmp_path)


def test_folders_of_several_data_sets_are_refused(shards):
    train = open_index(shards).holder(0)
    write(train.with_name("more.parquet"), [b"A"], [0], ["cat", "dog"])
    with pytest.raises(ValueError, match=r"data holds Parquet files of several splits \(no split x 1, train x 3\)"):
        open_index(shards)
    train.with_name("more.parquet").rename(train.with_name("train-more.parquet"))
    with pytest.raises(ValueError, match="train-more.parquet has other class names than .*train-00000-of"):
        open_index(shards)
    write(train.with_name("train-more.parquet"), [b"A"], [0], {"0": "cat"})
    with pytest.raises(ValueError, match="train-more.parquet: the class names in the schema's metadata are no list"):
        open_index(shards)
    train.with_name("train-more.parquet").unlink()
    (shards / "x.tar").write_bytes(b"")
    with pytest.raises(ValueError, match=r"holds tar files \(x.tar, ...\) beside .*train-00000-of-00003.parquet"):
        open_index(shards)


def test_without_pyarrow_the_extra_is_named(shards, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ValueError, match=r"needs pyarrow: pip install 'pixelgen_fast\[parquet\]'"):
        open_index(shards)
