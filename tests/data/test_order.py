"""The order of a run's images: each epoch a permutation, all of them alike, found anywhere in the same few steps."""

import tracemalloc
from math import factorial

import numpy as np
import pytest
from scipy.stats import chi2

from pixelgen_fast.data.order import Order, position, positions

SIZES = [*range(1, 70), 127, 128, 129, 1000, 4096, 65537]


@pytest.mark.parametrize("seed, epoch", [(3, 0), (-1, 7), (2**64 - 2, 10**11)])
def test_every_epoch_visits_every_index_once(seed, epoch):
    for size in SIZES:
        indexes = positions(seed, range(epoch * size, (epoch + 1) * size), size)
        assert indexes.dtype == np.int64
        assert np.array_equal(np.sort(indexes), np.arange(size)), size


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = [positions(seed, range(e * 50, e * 50 + 50), 50) for seed in (3, 4) for e in range(4)]
    assert len({tuple(order) for order in orders}) == 8
    assert np.array_equal(positions(-1, range(50), 50), positions(2**64 - 1, range(50), 50))


def test_places_do_not_depend_on_what_else_is_asked_for():
    together = positions(5, range(90, 130), 37)
    assert together.tolist() == [position(5, n, 37) for n in range(90, 130)]
    assert positions(5, [], 37).shape == (0,)


def test_the_order_is_the_same_on_every_machine():
    assert positions(0, range(8), 1_281_167).tolist() == [
        814993, 227939, 1096096, 852093, 785242, 274195, 151347, 604070,
    ]  # fmt: skip
    assert positions(7, range(10**12, 10**12 + 4), 10**8).tolist() == [23471718, 75025959, 31745643, 20105656]


@pytest.mark.parametrize("size", [3, 4, 5])
def test_all_orders_are_equally_likely(size):
    epochs = 100 * factorial(size)
    orders = positions(0, range(size * epochs), size).reshape(epochs, size)
    _, counts = np.unique(orders, axis=0, return_counts=True)
    assert len(counts) == factorial(size)
    assert ((counts - 100) ** 2 / 100).sum() < chi2.ppf(0.999, factorial(size) - 1)


@pytest.mark.parametrize("size", [13, 16, 100])
def test_every_image_is_as_likely_at_every_place_and_behind_every_other(size):
    epochs = 1000
    orders = positions(1, range(size * epochs), size).reshape(epochs, size)
    at = np.zeros((size, size))
    np.add.at(at, (np.arange(size), orders), 1)
    mean = epochs / size
    # Rows and columns have fixed sums: (size - 1)^2 degrees of freedom, each of variance size / (size - 1).
    assert ((at - mean) ** 2 / mean).sum() * (size - 1) / size < chi2.ppf(0.999, (size - 1) ** 2)
    apart = np.bincount((orders[:, 1] - orders[:, 0]) % size, minlength=size)[1:]
    assert ((apart - epochs / (size - 1)) ** 2).sum() * (size - 1) / epochs < chi2.ppf(0.999, size - 2)


def test_memory_does_not_grow_with_the_data_set():
    positions(0, range(64), 100)
    tracemalloc.start()
    positions(0, range(10**9, 10**9 + 64), 10**8)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 200_000


def test_ranks_share_a_step_and_micro_batches_a_share():
    orders = [Order(seed=0, global_batch=12, micro_batch=3, rank=r, world=2, start=24) for r in range(2)]
    assert [list(order.numbers(q)) for q in (0, 1, 2) for order in orders] == [
        [24, 25, 26], [30, 31, 32], [27, 28, 29], [33, 34, 35], [36, 37, 38], [42, 43, 44],
    ]  # fmt: skip
