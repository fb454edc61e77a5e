"""Readers that are killed or stopped: the batches stay the same to the bit, and nothing waits for ever."""

import multiprocessing
import os
import pickle
import signal
import time
from contextlib import closing

import numpy as np
import pytest
import torch
from PIL import Image
from support.faulty_sources import Broken, Deadly

from pixelgen_fast.config import Data
from pixelgen_fast.data import readers
from pixelgen_fast.data.dali import Loader
from pixelgen_fast.data.index import open_index
from pixelgen_fast.data.order import Order
from pixelgen_fast.data.readers import InProcess, Readers
from pixelgen_fast.data.source import Source
from pixelgen_fast.data.storage import DataAway, ResourceError

ORDER = Order(seed=5, global_batch=7, micro_batch=7)


@pytest.fixture
def source(tmp_path, make_photo):
    """Twenty images of 40 x 50 pixels, one of them empty."""
    for k in range(20):
        Image.fromarray(make_photo(40, 50, k)).save(tmp_path / f"{k:02d}.png")
    (tmp_path / "03.png").write_bytes(b"")
    return Source(open_index(tmp_path), seed=5, size=16, crop="adm", halvings=3)


def content(batch):
    items, _ = batch
    return [(item.data.tobytes(), item.geometry.tobytes(), item.index) for item in items]


def kill_all(pool: Readers) -> None:
    for reader in pool._readers:
        os.kill(reader.process.pid, signal.SIGKILL)


def test_readers_give_what_this_process_reads_and_say_what_they_found(source):
    here = InProcess(source, ORDER, 0)
    here.begin(2)
    pool = Readers(source, ORDER, 0, count=3, ahead=2)
    try:
        for begin in (2, 0, 4):
            pool.begin(begin)
            here.begin(begin)
            found = {}
            for _ in range(6):
                batch = pool.next()
                assert content(batch) == content(here.next())
                found |= batch[1]
            assert found == {3: "the file is empty (0 bytes)"}
    finally:
        pool.close()
    assert not multiprocessing.active_children()


def test_fewer_images_than_readers(source):
    order = Order(seed=5, global_batch=2, micro_batch=1, rank=1, world=2)
    here, pool = InProcess(source, order, 0), Readers(source, order, 0, count=3, ahead=3)
    try:
        here.begin(0)
        pool.begin(0)
        assert [content(pool.next()) for _ in range(8)] == [content(here.next()) for _ in range(8)]
    finally:
        pool.close()


def test_readers_killed_at_any_moment_change_nothing(source, caplog):
    """Before the first batch, right after asking, while they read, when all is read, and while they start again."""
    here, pool = InProcess(source, ORDER, 0), Readers(source, ORDER, 0, count=2, ahead=2)
    moments = {0: 0.0, 3: 0.0, 4: 0.003, 6: 0.05, 7: 0.3, 8: 0.0}
    try:
        here.begin(0)
        pool.begin(0)
        for k in range(12):
            if k in moments:
                for batch in range(pool._asked, pool._batch + pool.ahead):
                    pool._ask(batch)
                time.sleep(moments[k])
                kill_all(pool)
            assert content(pool.next()) == content(here.next()), k
    finally:
        pool.close()
    assert "ended (signal 9) and starts again" in caplog.text


def test_a_killed_reader_does_not_show_in_the_loaders_batches(source):
    def loader(workers):
        settings = Data(image_size=16, workers=workers, threads=1)
        return Loader(source.index, ORDER, settings)

    with loader(0) as here, loader(1) as there:
        for k in range(6):
            if k in (1, 3):
                kill_all(there._readers)
            assert all(torch.equal(a, b) for a, b in zip(next(here), next(there), strict=True))


def test_readers_of_a_large_index_killed_while_they_start(source):
    """What a reader begins with is more than a pipe holds."""
    source.index.classes = ["a class of a long name " * 100] * 100
    here, pool = InProcess(source, ORDER, 0), Readers(source, ORDER, 0, count=2, ahead=2)
    try:
        here.begin(0)
        pool.begin(0)
        for _ in range(2):
            kill_all(pool)
            assert content(pool.next()) == content(here.next())
    finally:
        pool.close()


def test_a_reader_that_stands_still_is_replaced(source, monkeypatch, caplog):
    monkeypatch.setattr(readers, "_SILENCE", 0.5)
    here, pool = InProcess(source, ORDER, 0), Readers(source, ORDER, 0, count=1, ahead=2)
    try:
        here.begin(0)
        pool.begin(0)
        assert content(pool.next()) == content(here.next())
        monkeypatch.setattr(readers, "_SILENCE", 3.0)
        os.kill(pool._readers[0].process.pid, signal.SIGSTOP)
        for _ in range(4):
            assert content(pool.next()) == content(here.next())
    finally:
        pool.close()
    assert "gave nothing for 3 s and starts again" in caplog.text


def test_a_reader_that_ends_again_and_again_is_an_error(source, monkeypatch):
    deadly = Deadly(source.index, 5, size=16, crop="adm", halvings=3)
    monkeypatch.setattr(readers, "_MOST_DEATHS", 1)
    with closing(Readers(deadly, ORDER, 0, count=1, ahead=1)) as pool:
        pool.begin(0)
        with pytest.raises(ResourceError, match=r"ended \(signal 9\), 2 times at images 0 to 6 .*fewer data.workers"):
            pool.next()


def test_a_fault_of_a_reader_comes_with_its_traceback(source):
    broken = Broken(source.index, 5, size=16, crop="adm", halvings=3)
    with closing(Readers(broken, ORDER, 0, count=1, ahead=1)) as pool:
        pool.begin(0)
        with pytest.raises(RuntimeError, match=r"(?s)a reader process failed: KeyError.*in prepare"):
            pool.next()


@pytest.mark.parametrize("count", [0, 1])
def test_data_that_come_back_are_waited_for_and_those_that_do_not_are_an_error(source, tmp_path, count, caplog):
    root, aside = source.index.root, tmp_path.with_name("aside")

    def pool(patience):
        return Readers(source, ORDER, patience, count=1, ahead=1) if count else InProcess(source, ORDER, patience)

    before, after = InProcess(source, ORDER, 0), pool(0.3)
    before.begin(0)
    expected = content(before.next())
    source._kept.clear()
    root.rename(aside)
    after.begin(0)
    try:
        with pytest.raises(DataAway, match=r"data root .* is away: .*No such file.*waited 0 s for it"):
            after.next()
        aside.rename(root)
        assert content(after.next()) == expected
    finally:
        after.close()
        if aside.exists():
            aside.rename(root)
    assert "is away" in caplog.text


def test_a_source_travels_without_what_it_has_read(source):
    list(source.items(range(20)))
    assert len(pickle.dumps(source)) < 5000
    assert np.array_equal(pickle.loads(pickle.dumps(source)).index.labels, source.index.labels)
