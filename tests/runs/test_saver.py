"""Checkpoints behind the training: what is copied is what is written, how many wait, and errors are heard."""

import threading
from pathlib import Path

import pytest
from support.engines import Memory, same

from pixelgen_fast.runs import checkpoint, saver
from pixelgen_fast.runs.checkpoint import DiskSpaceError
from pixelgen_fast.runs.saver import Saver


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Semaphore:
    """Writers wait until it is released, once for each checkpoint."""
    opened, real = threading.Semaphore(0), saver.write

    def write(*arguments):
        opened.acquire()
        return real(*arguments)

    monkeypatch.setattr(saver, "write", write)
    return opened


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path, gate: threading.Semaphore) -> None:
    engine = Memory(7)
    behind = Saver(tmp_path, engine, keep=2, background=True)
    behind.save(7, {"config": {}})
    assert behind.poll() == [] and checkpoint.checkpoints(tmp_path) == []
    for kinds in engine.state.values():  # the next step
        for tensor in kinds.values():
            tensor.add_(1.0)
    engine.buffer["shift"].add_(1.0)
    engine.counters = {"step": 8}
    gate.release()
    (done,) = behind.wait()
    assert (done.nimg, done.error) == (7, None) and done.waited >= 0 and done.written > 0
    other = Memory(8)
    checkpoint.load(checkpoint.latest_valid(tmp_path), other)
    assert same(other, Memory(7))
    behind.close()


def test_the_third_waits_for_the_first(tmp_path: Path, gate: threading.Semaphore, monkeypatch) -> None:
    waits, real = [], saver.wait

    def wait(futures):
        waits.append([future.done() for future in futures])
        gate.release()
        return real(futures)

    monkeypatch.setattr(saver, "wait", wait)
    behind = Saver(tmp_path, Memory(1), keep=9, background=True)
    behind.save(1, {})
    behind.save(2, {})
    assert waits == []
    behind.save(3, {})
    assert waits == [[False]] and [path.name[-1] for path in checkpoint.checkpoints(tmp_path)] == ["1"]
    gate.release()
    gate.release()
    assert [done.nimg for done in behind.wait()] == [1, 2, 3]
    behind.close()


def test_an_error_of_the_writer_is_heard_and_the_next_one_is_written(tmp_path: Path, monkeypatch) -> None:
    usage = checkpoint.shutil.disk_usage(tmp_path)
    behind = Saver(tmp_path, Memory(1), keep=2, background=True)
    with monkeypatch.context() as full:
        full.setattr(checkpoint.shutil, "disk_usage", lambda path: usage._replace(free=0))
        behind.save(1, {})
        (done,) = behind.wait()
    assert isinstance(done.error, DiskSpaceError) and behind.poll() == []
    behind.save(2, {})
    assert behind.wait()[0].error is None and checkpoint.latest_valid(tmp_path).name[-1] == "2"
    behind.close()


@pytest.mark.parametrize("background", [True, False])
def test_a_fault_of_the_writer_is_raised_in_the_training(tmp_path: Path, monkeypatch, background: bool) -> None:
    def faulty(*arguments):
        raise KeyError("a fault")

    monkeypatch.setattr(saver, "write", faulty)
    behind = Saver(tmp_path, Memory(1), keep=2, background=background)
    behind.save(1, {})
    with pytest.raises(KeyError, match="a fault"):
        behind.wait()
    behind.close()


def test_what_is_in_flight_is_written_when_the_run_ends(tmp_path: Path) -> None:
    behind = Saver(tmp_path, Memory(1), keep=2, background=True)
    behind.save(1, {})
    behind.save(2, {})
    behind.close()
    assert [path.name[-1] for path in checkpoint.checkpoints(tmp_path)] == ["2", "1"]


def test_written_at_once_where_that_is_asked_for(tmp_path: Path) -> None:
    at_once = Saver(tmp_path, Memory(1), keep=2, background=False)
    at_once.save(1, {})
    (done,) = at_once.poll()
    assert done.waited == done.written and done.error is None
    with pytest.raises(ValueError, match="keep must be"):
        Saver(tmp_path, Memory(1), keep=0, background=False).save(2, {})
