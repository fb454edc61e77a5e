import logging
import os
import pickle
import tarfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest

from pixelgen_fast.data.index import FolderIndex, PackedIndex, TarIndex, open_index


@pytest.fixture
def tree(tmp_path):
    """Files whose content is their own name; the index never looks inside."""
    root = tmp_path / "tree"
    for name in ("b/1.jpg", "b/deep/er/0.PNG", "a/x.webp", "a/ü z.JPEG", "c/2.png", ".hidden/1.jpg", "a/.x.jpg"):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return root


IN_ORDER = ["a/x.webp", "a/ü z.JPEG", "b/1.jpg", "b/deep/er/0.PNG", "c/2.png"]
LABELS = [0, 0, 1, 1, 2]


def check(index, root):
    assert index.classes == ["a", "b", "c"]
    assert len(index) == 5
    assert index.labels.tolist() == LABELS == [index.label(i) for i in range(5)]
    assert [index.read(i).decode() for i in range(5)] == IN_ORDER
    assert all(index.path(i).startswith(str(root)) and index.path(i).endswith(IN_ORDER[i]) for i in range(5))


def make_tar(tree, target, names, prefix=""):
    with tarfile.open(target, "w") as archive:
        for name in names:
            archive.add(tree / name, arcname=prefix + name)


def test_folder_tree_in_order_hidden_names_ignored(tree):
    index = open_index(tree)
    assert isinstance(index, FolderIndex)
    check(index, tree)
    check(pickle.loads(pickle.dumps(index)), tree)


def test_one_folder_is_one_class(tree):
    index = open_index(tree / "b" / "deep" / "er")
    assert index.classes == ["er"] and index.labels.tolist() == [0]


def test_links_are_read_and_loops_refused(tree, tmp_path):
    os.symlink(tree / "c", tree / "d")
    os.symlink(tree / "a" / "x.webp", tree / "c" / "linked.webp")
    index = open_index(tree)
    assert [index.path(i).removeprefix(f"{tree}/") for i in range(4, 8)] == [
        "c/2.png", "c/linked.webp", "d/2.png", "d/linked.webp",
    ]  # fmt: skip
    assert index.read(5) == b"a/x.webp"
    os.symlink(tree / "b", tree / "b" / "deep" / "up")
    with pytest.raises(ValueError, match="links to a folder above itself"):
        open_index(tree)


def test_other_files_are_named_with_counts(tree, caplog):
    for name in ("a/readme.txt", "a/notes.txt", "b/raw.tiff", "c/none"):
        (tree / name).write_text("")
    with caplog.at_level(logging.WARNING):
        check(open_index(tree), tree)
    assert ".txt x 2 (e.g. a/notes.txt), .tiff x 1 (e.g. b/raw.tiff), no extension x 1 (e.g. c/none)" in caplog.text


def test_empty_class_folders_and_split_folders_are_warned_about(tree, caplog):
    (tree / "empty").mkdir()
    with caplog.at_level(logging.WARNING):
        index = open_index(tree)
    assert index.classes == ["a", "b", "c", "empty"]
    assert "1 of 4 class folders hold no images: empty" in caplog.text
    for old, new in (("a", "train"), ("b", "val"), ("c", "test")):
        (tree / old).rename(tree / new)
    (tree / "empty").rmdir()
    with caplog.at_level(logging.WARNING):
        open_index(tree)
    assert "did you mean" in caplog.text


def test_a_root_one_level_too_high_is_noticed(tree, caplog):
    with caplog.at_level(logging.WARNING):
        open_index(tree)
        assert not caplog.text
        index = open_index(tree.parent)
    assert index.classes == [tree.name] and f"did you mean {tree}?" in caplog.text


@pytest.mark.parametrize(
    "files, error, message",
    [
        (None, FileNotFoundError, "does not exist"),
        ((), ValueError, "holds no images .*: it is empty"),
        (("a/x.txt", "b/y.gif"), ValueError, r"holds no images .*\.txt x 1"),
        (("a/x.jpg", "y.jpg"), ValueError, r"1 images beside class folders \(first: y.jpg\)"),
        (("images.npy", "labels.npy"), ValueError, "lacks classes.json"),
        (("x.tar",), ValueError, "not an uncompressed tar"),
    ],
)
def test_roots_without_data_are_refused(tmp_path, monkeypatch, files, error, message):
    monkeypatch.setenv("PIXELGEN_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "root"
    if files is not None:
        root.mkdir()
    for name in files or ():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text("no image")
    with pytest.raises(error, match=message) as caught:
        open_index(root)
    assert str(root) in str(caught.value)


FOREIGN = (
    "@eaDir/a/1.jpg", "a/@eaDir/x.webp/SYNOFILE_THUMB_M.jpg", "__MACOSX/a/2.png", "b/#recycle/1.jpg", "b/.thumbs/1.jpg",
    "$RECYCLE.BIN/1.jpg", "lost+found/1.jpg", "b/deep/.DS_Store", "a/._x.webp",
)  # fmt: skip


def test_folders_of_the_storage_system_are_no_part_of_a_tree_or_a_tar(tree, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("PIXELGEN_CACHE", str(tmp_path / "cache"))
    for name in FOREIGN:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text("not of the data set")
    make_tar(tree, tmp_path / "all.tar", [*FOREIGN, *IN_ORDER])
    for root in (tree, tmp_path / "all.tar"):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            check(open_index(root), root)
        assert "folders of the storage system: @eaDir x 2" in caplog.text


def test_a_tree_and_its_tar_have_the_same_order(tree, tmp_path, monkeypatch):
    """Class first, then name, folder by folder, where the characters of a whole path would sort otherwise."""
    monkeypatch.setenv("PIXELGEN_CACHE", str(tmp_path / "cache"))
    names = ["a/1.jpg", "a/1 b.jpg", "a/1/2.jpg", "a b/0.jpg", "a-b/0.jpg", "a.b/0.jpg", "a/1.d/0.jpg"]
    root = tmp_path / "sorted"
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    make_tar(root, tmp_path / "sorted.tar", names)
    folder, tar = open_index(root), open_index(tmp_path / "sorted.tar")
    assert folder.classes == tar.classes == ["a", "a b", "a-b", "a.b"]
    assert folder.labels.tolist() == tar.labels.tolist() == [0, 0, 0, 0, 1, 2, 3]
    assert [folder.read(i) for i in range(7)] == [tar.read(i) for i in range(7)]


def test_a_tar_one_level_too_high_is_noticed(tree, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("PIXELGEN_CACHE", str(tmp_path / "cache"))
    make_tar(tree, tmp_path / "all.tar", IN_ORDER, prefix="train/")
    with caplog.at_level(logging.WARNING):
        assert open_index(tmp_path / "all.tar").classes == ["train"]
    assert "one class, train, with folders below it" in caplog.text


def test_a_file_that_is_no_tar_is_refused(tree):
    with pytest.raises(ValueError, match=r"not a \.tar"):
        open_index(tree / "c" / "2.png")


def test_tar_and_shards_hold_the_same_as_the_tree(tree, tmp_path, monkeypatch):
    monkeypatch.setenv("PIXELGEN_CACHE", str(tmp_path / "cache"))
    make_tar(tree, tmp_path / "all.tar", IN_ORDER[::-1], prefix="./")
    shards = tmp_path / "shards"
    shards.mkdir()
    make_tar(tree, shards / "1.tar", IN_ORDER[:1] + IN_ORDER[3:])
    make_tar(tree, shards / "0.tar", IN_ORDER[1:3])
    for root in (tmp_path / "all.tar", shards):
        index = open_index(root)
        assert isinstance(index, TarIndex)
        check(index, root)
        check(pickle.loads(pickle.dumps(index)), root)
    index = open_index(shards)
    index.read(0)  # the open file must not travel to another process
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        assert pool.submit(index.read, 4).result() == b"c/2.png"


def test_tar_members_are_scanned_once_and_again_after_a_change(tree, tmp_path, monkeypatch):
    monkeypatch.setenv("PIXELGEN_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "all.tar"
    make_tar(tree, path, IN_ORDER)
    open_index(path)
    with monkeypatch.context() as patch:
        patch.setattr(tarfile, "open", lambda *a, **k: pytest.fail("the tar was scanned again"))
        check(open_index(path), path)
    make_tar(tree, path, IN_ORDER[:2])
    os.utime(path, ns=(0, 0))
    assert len(open_index(path)) == 2
    index = open_index(path)
    os.truncate(path, 600)
    with pytest.raises(OSError, match="cut short"):
        index.read(1)


def test_tar_members_without_class_and_links_are_refused(tree, tmp_path, monkeypatch):
    monkeypatch.setenv("PIXELGEN_CACHE", str(tmp_path / "cache"))
    make_tar(tree / "c", tmp_path / "flat.tar", ["2.png"])
    with pytest.raises(ValueError, match=r"member 2.png has no class folder"):
        open_index(tmp_path / "flat.tar")
    os.symlink(tree / "c" / "2.png", tree / "c" / "3.png")
    make_tar(tree, tmp_path / "link.tar", ["c/2.png", "c/3.png"])
    with pytest.raises(ValueError, match=r"member c/3\.png is a link"):
        open_index(tmp_path / "link.tar")


def test_packed_folder(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (3, 4, 4, 3), dtype=np.uint8)
    np.save(tmp_path / "images.npy", images)
    np.save(tmp_path / "labels.npy", np.array([1, 0, 1]))
    (tmp_path / "classes.json").write_text('["cat", "dog"]')
    index = open_index(tmp_path)
    assert isinstance(index, PackedIndex)
    assert (len(index), index.size, index.classes, index.label(2)) == (3, 4, ["cat", "dog"], 1)
    data = pickle.dumps(index)
    assert len(data) < 2000  # the images stay on disk
    for each in (index, pickle.loads(data)):
        assert each.read(1) == b"P6\n4 4\n255\n" + images[1].tobytes()
        assert each.path(1) == f"{tmp_path / 'images.npy'}[1]"


@pytest.mark.parametrize(
    "shape, dtype, labels, message",
    [
        ((3, 4, 5, 3), np.uint8, [0, 0, 0], "must be uint8"),
        ((3, 4, 4, 3), np.float32, [0, 0, 0], "must be uint8"),
        ((3, 4, 4, 3), np.uint8, [0, 0], "3 images and 2 labels"),
        ((3, 4, 4, 3), np.uint8, [0, 0, 1], "goes to 1, classes.json has 1"),
    ],
)
def test_damaged_packed_folders_are_refused(tmp_path, shape, dtype, labels, message):
    np.save(tmp_path / "images.npy", np.zeros(shape, dtype))
    np.save(tmp_path / "labels.npy", np.array(labels))
    (tmp_path / "classes.json").write_text('["one"]')
    with pytest.raises(ValueError, match=message):
        open_index(tmp_path)
