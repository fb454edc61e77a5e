"""Why a read failed: what lacks is not damaged, what is away is not damaged, what is cut short is named."""

import errno
import logging
import os
import pickle
import resource
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from pixelgen_fast.data.encoded import UnreadableImage
from pixelgen_fast.data.index import open_index
from pixelgen_fast.data.order import Order
from pixelgen_fast.data.pack import pack
from pixelgen_fast.data.readers import InProcess, Readers
from pixelgen_fast.data.scan import scan
from pixelgen_fast.data.source import Source
from pixelgen_fast.data.storage import DataAway, OpenFiles, ResourceError, away, patiently, read_bytes


@pytest.fixture
def files(tmp_path):
    for k in range(9):
        (tmp_path / str(k)).write_text(f"file {k} " * 3)
    return tmp_path


def handles() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def few_handles():
    """Lets the process open two dozen more files, and then as many as before. A reader that starts takes about a dozen
    where the process holds its first numbers without a gap."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 24, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_the_least_recently_used_files_are_closed(files):
    opened, before = OpenFiles(3), handles()
    for k in (0, 1, 2, 0, 3, 4, 0, 5):
        assert opened.read(files / str(k), 5, 2) == f"{k} ".encode()
    assert len(opened) == 3 and handles() == before + 3
    assert len(pickle.loads(pickle.dumps(opened))) == 0
    del opened
    assert handles() == before


def test_a_file_that_another_thread_still_reads_stays_open(files):
    opened, started = OpenFiles(1), threading.Barrier(8)

    def read(worker):
        started.wait()
        return all(
            opened.read(files / str(k % 9), 5, 1) == str(k % 9).encode()
            for k in range(worker, worker + 300, 1 + worker)
        )

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(8)))


def test_at_the_limit_of_the_process_its_own_files_are_closed_first(files, few_handles):
    opened = OpenFiles(1000)
    held = []
    for k in range(5):
        opened.read(files / str(k), 0, 1)
    with pytest.raises(OSError, match="Too many open files"):
        while True:
            held.append(os.open(files / "0", os.O_RDONLY))
    assert opened.read(files / "8", 5, 1) == b"8" and len(opened) == 1
    for file in held:
        os.close(file)


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, None])
def test_a_lack_of_resources_is_no_damage(small_tree, monkeypatch, number):
    index = open_index(small_tree)

    def lacking(i):
        raise MemoryError if number is None else OSError(number, os.strerror(number), index.path(i))

    monkeypatch.setattr(index, "read", lacking)
    with pytest.raises(ResourceError, match=r"cannot read .*\.png: .*(limit|close other|fewer)"):
        list(Source(index, 0, size=12, crop="none", halvings=0).items([0]))


def test_memory_that_lacks_for_decoding_is_no_damage(small_tree, monkeypatch):
    def no_memory(*_):
        raise MemoryError

    source = Source(open_index(small_tree), 0, size=12, crop="none", halvings=0)
    monkeypatch.setattr("pixelgen_fast.data.source.inspect", no_memory)
    with pytest.raises(ResourceError, match=r"cannot decode .*png: there is no memory left"):
        list(source.items([0]))


@pytest.fixture
def tars(small_tree, tmp_path, monkeypatch):
    """The eleven images and copies of them in 66 tar files."""
    monkeypatch.setenv("PIXELGEN_CACHE", str(tmp_path / "cache"))
    shards = tmp_path / "shards"
    shards.mkdir()
    for k in range(66):
        with tarfile.open(shards / f"{k:02d}.tar", "w") as archive:
            source = next((small_tree / ("a" if k % 11 < 4 else "b")).glob(f"{k % 11:02d}.png"))
            archive.add(source, f"{source.parent.name}/{k:02d}.png")
    return shards


@pytest.mark.parametrize("count", [0, 1])
def test_more_tar_files_than_file_handles_lose_no_image(tars, few_handles, count):
    index, order = open_index(tars), Order(seed=0, global_batch=66, micro_batch=66)
    source = Source(index, 0, size=12, crop="none", halvings=0)
    pool = Readers(source, order, 0, count=count, ahead=1) if count else InProcess(source, order, 0)
    try:
        pool.begin(0)
        items, found = pool.next()
    finally:
        pool.close()
    assert not found and sorted(item.index for item in items) == list(range(66))


def test_a_root_that_is_away_is_not_damage_and_a_file_that_is_missing_is(small_tree, tars):
    for index in (open_index(small_tree), open_index(tars), open_index(tars / "00.tar")):
        root, aside = index.root, index.root.with_name("aside")
        root.rename(aside)
        with pytest.raises(DataAway, match=f"data root {root} is away: "):
            read_bytes(index, 0)
        if aside.is_dir():
            root.mkdir()  # what is left of a disk that is no longer mounted
            assert away(root)
            with pytest.raises(DataAway):
                read_bytes(index, 0)
            root.rmdir()
        aside.rename(root)
        assert not away(root) and read_bytes(index, 0)
    index = open_index(small_tree)
    (small_tree / "a" / "00.png").unlink()
    with pytest.raises(UnreadableImage, match="No such file"):
        read_bytes(index, 0)


def test_a_linked_class_that_is_away_is_not_damage(small_tree, tmp_path):
    (small_tree / "b").rename(tmp_path / "store")
    (small_tree / "b").symlink_to(tmp_path / "store")
    index = open_index(small_tree)
    (tmp_path / "store").rename(tmp_path / "gone")
    with pytest.raises(DataAway):
        read_bytes(index, 10)
    assert read_bytes(index, 0)


def test_waiting_says_so_and_ends(caplog):
    tries = []

    def read():
        tries.append(0)
        if len(tries) < 4:
            raise DataAway("data root /x is away: gone")
        return 7

    with caplog.at_level(logging.WARNING):
        assert patiently(read, 60) == 7
    assert [record.getMessage().partition(" after")[0] for record in caplog.records] == [
        "data root /x is away: gone; waiting up to 60 s for it (data.wait_seconds)", "the data are back",
    ]  # fmt: skip
    tries.clear()
    with pytest.raises(DataAway, match=r"waited 0 s for it \(data.wait_seconds\)"):
        patiently(read, 0)
    tries.clear()
    with pytest.raises(DataAway, match="waited 0 s"):
        patiently(read, 60, asked=lambda: True)


def test_a_packed_file_that_is_cut_short_is_named_with_both_sizes(small_tree, tmp_path):
    out = tmp_path / "packed"
    pack(small_tree, out, 12)
    whole = (out / "images.npy").stat().st_size
    index = open_index(out)
    os.truncate(out / "images.npy", whole - 500)
    message = rf"images\.npy is cut short: it has {whole - 500:,} bytes, and its 11 images need {whole:,}"
    with pytest.raises(ValueError, match=message):
        open_index(out)
    assert index.read(7).endswith(bytes([140]) * 432)
    with pytest.raises(ValueError, match=message):
        list(Source(index, 0, size=12, crop="none", halvings=0).items(range(11)))


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("images.npy", b"\x93NUMPY\x01\x00", "does not begin as an .npy file does"),
        ("labels.npy", b"\x93NUMPY", "does not begin as an .npy file does"),
        ("labels.npy", np.zeros(11), "must hold integers"),
        ("classes.json", b'["a", ', "is damaged"),
        ("classes.json", b'{"a": 1}', "must be a list of class names"),
    ],
)
def test_each_damaged_file_of_a_packed_folder_is_named(small_tree, tmp_path, name, content, message):
    out = tmp_path / "packed"
    pack(small_tree, out, 12)
    if isinstance(content, bytes):
        (out / name).write_bytes(content)
    else:
        np.save(out / name, content)
    with pytest.raises(ValueError, match=f"{name} {message}"):
        open_index(out)


def test_scan_and_pack_tell_lack_and_absence_from_damage_too(small_tree, tmp_path, monkeypatch):
    def lacking(self, i):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr("pixelgen_fast.data.index.FolderIndex.read", lacking)
    for command in (lambda: scan(small_tree), lambda: pack(small_tree, tmp_path / "out", 12)):
        with pytest.raises(ResourceError, match="ulimit -n"):
            command()
    assert not (tmp_path / "out").exists()
