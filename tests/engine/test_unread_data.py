"""A run that cannot read its images saves what it has trained, ends with the reason, and goes on where it stopped."""

import os
import signal

import pytest
import torch
from support.runs import newest, train

from pixelgen_fast.cli import main
from pixelgen_fast.data.dali import Loader
from pixelgen_fast.data.order import Order
from pixelgen_fast.data.storage import DataAway
from pixelgen_fast.engine.feed import Feed
from pixelgen_fast.runs.checkpoint import read_state, read_weights

WARM = "optimizer.warmup_images=32"


def failing_after(monkeypatch: pytest.MonkeyPatch, batches: int, error: Exception) -> None:
    """The loader of the next run gives so many batches and then raises."""
    read, left = Loader.__next__, [batches]

    def next_batch(self: Loader):
        if not left[0]:
            raise error
        left[0] -= 1
        return read(self)

    monkeypatch.setattr(Loader, "__next__", next_batch)


def test_a_run_whose_data_are_gone_is_saved_and_goes_on_later(tmp_path, monkeypatch, capsys) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert main(train(whole, 128, WARM)) == 0
    with monkeypatch.context() as patch:
        failing_after(patch, 11, DataAway("data root /x is away: gone"))
        assert main(train(broken, 128, WARM)) == 2
    said = capsys.readouterr().err
    assert "data root /x is away: gone; the run is saved at image 80, and the same command goes on from there" in said
    assert read_state(newest(broken))["nimg"] == 80
    assert main(train(broken, 128, WARM)) == 0
    expected, found = (read_weights(newest(folder), "raw") for folder in (whole, broken))
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_signal_while_data_are_away_stops_the_run_as_ever(tmp_path, monkeypatch, capsys) -> None:
    def away(self: Loader):
        os.kill(os.getpid(), signal.SIGTERM)
        raise DataAway("data root /x is away: gone")

    read, left = Loader.__next__, [10]

    def next_batch(self: Loader):
        left[0] -= 1
        return read(self) if left[0] >= 0 else away(self)

    monkeypatch.setattr(Loader, "__next__", next_batch)
    assert main(train(tmp_path / "run", 128, WARM)) == 75
    assert "stopped by a signal at image 80" in capsys.readouterr().out
    assert read_state(newest(tmp_path / "run"))["nimg"] == 80


def test_a_fault_of_the_loader_is_saved_from_too_and_keeps_its_traceback(tmp_path, monkeypatch, capsys) -> None:
    failing_after(monkeypatch, 5, KeyError("a fault"))
    assert main(train(tmp_path / "run", 128, WARM)) == 70
    assert "KeyError: 'a fault'" in capsys.readouterr().err
    assert read_state(newest(tmp_path / "run"))["nimg"] == 32


def test_data_that_cannot_be_read_at_the_beginning_leave_no_checkpoint(tmp_path, monkeypatch, capsys) -> None:
    failing_after(monkeypatch, 0, DataAway("data root /x is away: gone"))
    assert main(train(tmp_path / "run", 128, WARM)) == 2
    assert "data root /x is away" in capsys.readouterr().err
    assert not (tmp_path / "run" / "checkpoints").exists()


class Batches:
    """Gives 0, 1, 2 and no more."""

    def __init__(self) -> None:
        self.values = iter(range(3))

    def __next__(self) -> int:
        return next(self.values)


def test_a_step_takes_what_was_fetched_and_then_reads_for_itself() -> None:
    feed = Feed(Batches(), Order(seed=0, global_batch=4, micro_batch=4, start=8))
    assert feed.take() == ([0], [8])
    feed.fetch()
    assert feed.take() == ([1], [12]) and feed.take() == ([2], [16])
    feed.fetch()
    assert isinstance(feed.error, StopIteration)


def test_a_rank_that_can_read_names_the_other() -> None:
    assert "another rank cannot read" in Feed(Batches(), Order(0, 4, 4)).reason()
