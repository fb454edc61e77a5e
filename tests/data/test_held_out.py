"""Which images are held out: a keyed choice by name, disjoint from what is trained on, the same wherever they lie."""

import pickle
import shutil
import tarfile

import numpy as np
import pytest
from PIL import Image

from pixelgen_fast.data.cropped import first_readable
from pixelgen_fast.data.held_out import SubsetIndex, keys, looked_at, split
from pixelgen_fast.data.index import open_index
from pixelgen_fast.data.order import Order
from pixelgen_fast.data.source import Source


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """400 images of two classes; the first pixel of each is its own number."""
    folder = tmp_path_factory.mktemp("data") / "images"
    for i in range(400):
        (folder / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        pixels = np.full((4, 4, 3), i // 2, dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "ab"[i % 2] / f"{i:03}.png")
    return folder


def names(index):
    return {index.path(i).removeprefix(str(index.root)) for i in range(len(index))}


def test_the_two_parts_are_the_whole_once(root):
    whole = open_index(root)
    train, held = split(whole, 0.25, seed=3)
    assert names(train).isdisjoint(names(held)) and names(train) | names(held) == names(whole)
    # binomial(400, 1/4): six standard deviations are 52
    assert abs(len(held) - 100) < 52
    for part in (train, held):
        for i in (0, len(part) - 1):
            assert part.read(i) == whole.read(int(part.numbers[i])) and part.label(i) == int("/b/" in part.path(i))
    assert len({whole.fingerprint, train.fingerprint, held.fingerprint}) == 3


def test_the_order_of_training_never_meets_what_is_held_out(root):
    train, held = split(open_index(root), 0.2, seed=0)
    source = Source(train, 7, size=4, crop="none", halvings=0)
    order = Order(seed=7, global_batch=len(train), micro_batch=len(train))
    seen = {train.path(item.index) for item in source.items(order.numbers(0))}
    assert len(seen) == len(train) and seen.isdisjoint({held.path(i) for i in range(len(held))})


def test_the_choice_depends_on_seed_and_name_alone(root, tmp_path, monkeypatch):
    """Not on other images that are there, and not on how the images are stored; a larger share holds a smaller one."""
    monkeypatch.setenv("PIXELGEN_CACHE", str(tmp_path / "cache"))
    held = names(split(open_index(root), 0.25, seed=3)[1])
    assert held != names(split(open_index(root), 0.25, seed=4)[1])
    assert held < names(split(open_index(root), 0.5, seed=3)[1])
    fewer = tmp_path / "fewer"
    shutil.copytree(root, fewer)
    for path in sorted(fewer.glob("*/*.png"))[::3]:
        path.unlink()
    left = names(open_index(fewer))
    assert names(split(open_index(fewer), 0.25, seed=3)[1]) == held & left


def test_keys_are_spread_evenly(root):
    shares = np.sort(keys(open_index(root), 0) / 2.0**64)
    assert np.abs(shares - np.linspace(0, 1, 400)).max() < 0.1  # Kolmogorov and Smirnov, p = 0.0007


def test_the_images_that_are_looked_at_come_by_key(root):
    index = open_index(root)
    order = list(looked_at(index, 5))
    assert sorted(order) == list(range(400)) and order == np.argsort(keys(index, 5)).tolist()
    numbers, images = first_readable(index, order, 10, 4, "adm")
    assert numbers.tolist() == order[:10]
    for i, image in zip(numbers, images, strict=True):
        assert (image == int(index.path(i)[-7:-4]) // 2).all()


def test_an_unreadable_image_gives_way_to_the_next(root, tmp_path, caplog):
    folder = tmp_path / "images"
    shutil.copytree(root, folder)
    index = open_index(folder)
    first, second, third = list(looked_at(index, 5))[:3]
    open(index.path(second), "wb").close()
    numbers, _ = first_readable(index, looked_at(index, 5), 2, 4, "adm")
    assert numbers.tolist() == [first, third] and index.path(second) in caplog.text


def test_a_subset_travels_to_another_process(root):
    train, _ = split(open_index(root), 0.25, seed=3)
    copy = pickle.loads(pickle.dumps(train))
    assert isinstance(copy, SubsetIndex) and copy.path(7) == train.path(7) and copy.fingerprint == train.fingerprint


def test_tars_hold_out_as_well(root, tmp_path, monkeypatch):
    monkeypatch.setenv("PIXELGEN_CACHE", str(tmp_path / "cache"))
    with tarfile.open(tmp_path / "images.tar", "w") as archive:
        archive.add(root, ".")
    train, held = split(open_index(tmp_path / "images.tar"), 0.25, seed=3)
    assert len(train) + len(held) == 400 and names(train).isdisjoint(names(held))


@pytest.mark.parametrize(("share", "said"), [(1e-9, "holds out none"), (1 - 1e-9, "leaves none to train on")])
def test_an_empty_part_is_refused(root, share, said):
    with pytest.raises(ValueError, match=f"data.validation.share .* of 400 images .* {said}"):
        split(open_index(root), share, 0)
