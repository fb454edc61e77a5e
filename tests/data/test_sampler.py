"""Balanced classes: equal counts, every image of a class once a lap, any place found alone, by any number of ranks."""

import tracemalloc

import numpy as np
import pytest
from scipy.stats import chi2

from pixelgen_fast.data.index import open_index
from pixelgen_fast.data.order import Order
from pixelgen_fast.data.sampler import ClassBalancedSampler, UniformSampler, choose_sampler, describe_shares
from pixelgen_fast.data.source import Source

SIZES = [1, 2, 3, 7, 16, 17, 100, 0, 5]  # of nine classes; one has no images
CLASSES = [k for k, size in enumerate(SIZES) if size]
LABELS = np.repeat(np.arange(9), SIZES)
MIXED = np.random.default_rng(0).permutation(LABELS)


@pytest.mark.parametrize("labels", [LABELS, MIXED], ids=["sorted", "mixed"])
@pytest.mark.parametrize("seed", [0, -7, 2**64 - 1])
def test_every_class_comes_equally_often_and_its_images_one_after_the_other(labels, seed):
    sampler = ClassBalancedSampler(seed, labels)
    indexes = sampler.indexes(range(8 * 250))
    drawn = labels[indexes]
    for n in (0, 1, 7, 8, 13, 151, 1000, 2000):
        counts = np.bincount(drawn[:n], minlength=9)[CLASSES]
        assert counts.max() - counts.min() <= 1 and counts.sum() == n
    laps = []
    for label in CLASSES:
        of_class, size = indexes[drawn == label], SIZES[label]
        whole = of_class[: len(of_class) // size * size].reshape(-1, size)
        assert np.array_equal(np.sort(whole), np.tile(np.flatnonzero(labels == label), (len(whole), 1)))
        laps.append({tuple(lap) for lap in whole})
    assert len(laps[CLASSES.index(4)]) == 250 // 16  # laps have orders of their own


def test_rounds_and_laps_are_drawn_anew():
    sampler = ClassBalancedSampler(3, LABELS)
    rounds = LABELS[sampler.indexes(range(8 * 2000))].reshape(2000, 8)
    at = np.zeros((8, 8))
    np.add.at(at, (np.arange(8), np.searchsorted(CLASSES, rounds)), 1)
    # rows and columns have fixed sums: 49 degrees of freedom, each of variance 8 / 7
    assert ((at - 250) ** 2 / 250).sum() * 7 / 8 < chi2.ppf(0.999, 49)
    pairs = sampler.indexes(range(8 * 2000))[rounds.ravel() == 1]  # of the class of two images
    first = (pairs.reshape(-1, 2)[:, 0] == 1).mean()
    assert abs(first - 0.5) < 4 * 0.5 / np.sqrt(1000)


def test_other_seeds_have_other_orders_and_no_class_follows_another():
    a, b = (ClassBalancedSampler(seed, LABELS).indexes(range(800)) for seed in (1, 2))
    assert (a == b).mean() < 0.1
    equal = np.repeat(np.arange(4), 50)
    drawn = ClassBalancedSampler(0, equal).indexes(range(200))
    of_class = [drawn[equal[drawn] == k] - 50 * k for k in range(4)]
    assert all((of_class[i] == of_class[j]).sum() < 10 for i in range(4) for j in range(i))


@pytest.mark.parametrize("labels", [LABELS, MIXED], ids=["sorted", "mixed"])
def test_any_number_is_found_alone_and_far_away(labels):
    sampler = ClassBalancedSampler(5, labels)
    for begin in (0, 777, 10**14):
        together = sampler.indexes(range(begin, begin + 40))
        assert together.tolist() == [int(sampler.indexes([n])[0]) for n in range(begin, begin + 40)]
        assert np.array_equal(sampler.indexes(reversed(range(begin, begin + 40))), together[::-1])
    assert sampler.indexes([]).shape == (0,)


def test_the_order_is_the_same_on_every_machine():
    labels = np.repeat(np.arange(1000), np.arange(1000) + 1)
    assert ClassBalancedSampler(0, labels).indexes([0, 1, 2, 10**12]).tolist() == [80173, 240067, 105539, 439258]


def test_memory_and_time_do_not_grow_with_the_place():
    sampler = ClassBalancedSampler(0, LABELS)
    sampler.indexes(range(64))
    tracemalloc.start()
    sampler.indexes(range(10**15, 10**15 + 64))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 400_000


@pytest.mark.parametrize("world, micro", [(1, 12), (2, 3), (4, 3), (3, 2)])
def test_ranks_that_start_anywhere_see_the_one_order(small_tree, world, micro):
    def source():
        return Source(open_index(small_tree), 9, size=12, crop="none", halvings=0, class_balanced=True)

    whole = [item.index for item in source().items(range(24, 72))]
    ranks = [Order(9, 12, micro, rank, world, start=24) for rank in range(world)]
    found = {n: item.index for order in ranks for q in range(4 * order.accumulation)
             for n, item in zip(order.numbers(q), source().items(order.numbers(q)), strict=True)}  # fmt: skip
    assert [found[n] for n in range(24, 72)] == whole
    assert np.bincount([open_index(small_tree).label(i) for i in whole]).tolist() == [24, 24]


def test_an_unreadable_image_is_replaced_by_one_of_its_class(small_tree):
    for name in ("a/00.png", "a/02.png"):
        (small_tree / name).write_bytes(b"")
    source = Source(open_index(small_tree), 0, size=12, crop="none", halvings=0, class_balanced=True)
    items = [item.index for item in source.items(range(80))]
    assert set(source.found) == {0, 2} and not {0, 2} & set(items)
    assert np.bincount(source.index.labels[items]).tolist() == [40, 40]
    for name in ("a/01.png", "a/03.png"):
        (small_tree / name).write_bytes(b"")
    source = Source(open_index(small_tree), 0, size=12, crop="none", halvings=0, class_balanced=True)
    assert {source.index.label(item.index) for item in source.items(range(10))} == {1}


def test_substitutes_are_all_images_those_of_the_class_first():
    sampler = ClassBalancedSampler(4, MIXED)
    for number in (0, 1, 2, 10**9):
        label = MIXED[sampler.indexes([number])[0]]
        tried = [*sampler.substitutes(number)]
        own = np.flatnonzero(label == MIXED)
        assert sorted(tried[: len(own)]) == own.tolist() and sorted(tried[len(own) :]) == [*range(len(MIXED))]


def test_what_balancing_means_is_said_and_one_class_is_refused(small_tree):
    index = open_index(small_tree)
    # 11 images, half of them of each class: 5.5 of 4 images and of 7
    assert "smallest class, of 4, comes 1.38 times, of the largest, of 7, 0.786 times" in describe_shares(index)
    (small_tree / "empty").mkdir()
    assert "; 1 classes have no images and are never shown" in describe_shares(open_index(small_tree))
    with pytest.raises(ValueError, match=r"class_balanced is true, and all images of .* are of one class"):
        describe_shares(open_index(small_tree / "a"))
    assert isinstance(choose_sampler(index, 0, False), UniformSampler)
