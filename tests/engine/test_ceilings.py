"""What a machine reaches."""

import pytest
import torch

from pixelgen_fast.engine import ceilings
from pixelgen_fast.engine.ceilings import MatrixPeak, copy_rate


def test_rates_are_of_the_best_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """2 size^3 FLOPs a product, each byte of a copy read and written."""
    seconds = iter([2.0, 0.5, 1.0, 4.0, 0.25])
    monkeypatch.setattr(ceilings, "_seconds", lambda call, device: next(seconds))
    peak = MatrixPeak(4)
    assert [peak.measure(2), peak.measure()] == [2 * 64 / 0.5] * 2
    assert copy_rate("cpu", 1000, repeats=2) == 2 * 1000 / 0.25


def test_the_clock_is_of_the_whole_call() -> None:
    done = []
    assert ceilings._seconds(lambda: done.append(1), torch.device("cpu")) > 0 and done == [1]
