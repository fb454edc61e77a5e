"""The learning rate at the images where it is known."""

import pytest

from pixelgen_fast.engine.schedule import learning_rate
from pixelgen_fast.optimizer import Drop, Optimizer


def test_warmup_rises_linearly_to_the_rate() -> None:
    optimizer = Optimizer(lr=2.0, warmup_images=100)
    assert [learning_rate(optimizer, n, 1000) for n in (0, 25, 100, 999)] == [0.0, 0.5, 2.0, 2.0]


def test_cosine_ends_at_zero_and_passes_half_in_the_middle() -> None:
    optimizer = Optimizer(lr=2.0, warmup_images=100, schedule="cosine")
    assert learning_rate(optimizer, 100, 1100) == 2.0
    assert learning_rate(optimizer, 600, 1100) == pytest.approx(1.0)
    assert learning_rate(optimizer, 1100, 1100) == pytest.approx(0.0, abs=1e-15)


def test_drops_take_effect_at_their_image() -> None:
    optimizer = Optimizer(lr=1.0, schedule="stepped", drops=[Drop(100, 0.1), Drop(200, 0.01)])
    assert [learning_rate(optimizer, n, 300) for n in (0, 99, 100, 199, 200)] == [1.0, 1.0, 0.1, 0.1, 0.01]


def test_a_linear_rate_runs_straight_from_drop_to_drop() -> None:
    optimizer = Optimizer(lr=2.0, schedule="linear", warmup_images=10, drops=[Drop(100, 2.0), Drop(200, 1.0)])
    rates = [learning_rate(optimizer, n, 900) for n in (5, 10, 99, 100, 125, 150, 199, 200, 899)]
    assert rates == pytest.approx([1.0, 2.0, 2.0, 2.0, 1.75, 1.5, 1.01, 1.0, 1.0])
