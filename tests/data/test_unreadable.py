"""Images that cannot be read: by which others they are replaced, and when there are too many."""

import io
import logging
import multiprocessing
import os
import signal

import numpy as np
import pytest
from PIL import Image
from support.loading import SEED, joined, loader_of, same, take

from pixelgen_fast.data import Batch, encoded
from pixelgen_fast.data.encoded import UnreadableImage
from pixelgen_fast.data.order import position, substitutes
from pixelgen_fast.errors import InputError


@pytest.fixture
def damaged(tmp_path, make_photo):
    """20 images of 32 x 32, image k of one class; 8 of them unreadable, two so that only decoding tells (5 and 19)."""
    root = tmp_path / "damaged"
    root.mkdir()
    for k in range(20):
        Image.fromarray(make_photo(32, 32, k)).save(root / (f"{k:02d}.jpg" if k < 10 else f"{k:02d}.png"))
    jpeg, png = (root / "02.jpg").read_bytes(), (root / "12.png").read_bytes()
    webp = io.BytesIO()
    Image.fromarray(make_photo(32, 32)).save(webp, "WEBP")
    (root / "00.jpg").write_bytes(b"")
    (root / "01.jpg").write_bytes(b"these are words, not an image\n" * 9)
    (root / "02.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    (root / "05.jpg").write_bytes(jpeg[: len(jpeg) // 2] + b"\xff\xd9")
    (root / "12.png").write_bytes(png[: len(png) // 2])
    (root / "13.png").rename(root / "13.webp")
    (root / "13.webp").write_bytes(webp.getvalue()[:-100])
    (root / "18.png").unlink()
    (root / "18.png").symlink_to(root / "gone.png")
    spoilt = bytearray((root / "19.png").read_bytes())
    spoilt[len(spoilt) // 2] ^= 0xFF
    (root / "19.png").write_bytes(spoilt)
    return root


UNREADABLE = {0, 1, 2, 5, 12, 13, 18, 19}


def shown(number: int, size: int, unreadable: set[int]) -> int:
    """The index whose image stands for image `number`."""
    return next(i for i in (position(SEED, number, size), *substitutes(SEED, number, size)) if i not in unreadable)


def test_unreadable_images_are_replaced_by_good_ones_that_the_number_draws(damaged, make_photo, caplog):
    settings = {"image_size": 32, "global_batch": 8, "micro_batch": 8}
    with caplog.at_level(logging.WARNING), loader_of(damaged, **settings) as loader:
        batches = [next(loader) for _ in range(5)]
    good = {k: np.asarray(Image.open(p).convert("RGB")) for k, p in enumerate(sorted(damaged.iterdir()))
            if k not in UNREADABLE}  # fmt: skip
    got = joined(batches)
    for pixels, n in zip(got.images.numpy(), range(40), strict=True):
        assert np.array_equal(pixels, good[shown(n, 20, UNREADABLE)]), n
    assert {path.rpartition("/")[2][:2] for path in loader.replaced} == {f"{k:02d}" for k in UNREADABLE}
    assert all(path.startswith(str(damaged)) and reason for path, reason in loader.replaced.items())
    for path in loader.replaced:
        assert sum(path in record.getMessage() for record in caplog.records) == 1


def test_replacement_does_not_depend_on_batches_ranks_or_resuming(damaged):
    plain = joined(take(damaged, 3, image_size=32, global_batch=12, micro_batch=12))
    resumed = joined(take(damaged, 2, image_size=32, global_batch=12, micro_batch=6, start=24))
    assert same(resumed, Batch(*(x[24:36] for x in plain)))
    ranks = [take(damaged, 3, image_size=32, global_batch=12, micro_batch=6, rank=r, world=2) for r in range(2)]
    for step in range(3):
        both = joined([rank[step] for rank in ranks])
        assert same(both, Batch(*(x[12 * step : 12 * step + 12] for x in plain)))


def test_reader_processes_give_the_same_batches_through_damage_and_interrupts(damaged):
    settings = {"image_size": 32, "global_batch": 20, "micro_batch": 20}
    here = take(damaged, 6, **settings)
    with loader_of(damaged, **settings, workers=1) as loader:
        there = [next(loader) for _ in range(2)]
        (reader,) = multiprocessing.active_children()
        os.kill(reader.pid, signal.SIGINT)  # as Ctrl-C does; readers leave it to the trainer
        there += [next(loader) for _ in range(4)]
        assert reader.is_alive()
    assert same(joined(there), joined(here))
    assert not multiprocessing.active_children()


def test_labels_are_those_of_the_replacement(small_tree):
    """One class is gone: its share falls to all images of the other, and every label is the image's own."""
    for path in (small_tree / "a").iterdir():
        path.write_bytes(b"")
    got = joined(take(small_tree, 4, global_batch=11, micro_batch=11))
    index = [shown(n, 11, {0, 1, 2, 3}) for n in range(44)]
    assert got.images[:, 0, 0, 0].tolist() == [20 * i for i in index] and got.labels.tolist() == [1] * 44
    in_place = [i for n, i in enumerate(index) if position(SEED, n, 11) < 4]
    assert len(set(in_place)) >= 5 and max(map(in_place.count, in_place)) <= 6


def test_too_many_unreadable_images_are_an_error(small_tree):
    for path in (small_tree / "b").iterdir():
        path.write_bytes(b"")
    for k in range(11, 40):
        (small_tree / "b" / f"{k}.png").write_bytes(b"")
    with pytest.raises(UnreadableImage, match=r"11 of the 40 images of .* more than the 10 that data.max_unreadable"):
        take(small_tree, 20)
    assert len(take(small_tree, 20, max_unreadable=0.9)) == 20


def test_no_readable_image_is_an_error(tmp_path):
    for k, data in enumerate((b"", b"words", b"\xff\xd8\xff")):
        (tmp_path / f"{k}.jpg").write_bytes(data)
    with pytest.raises(UnreadableImage, match=f"all 3 images of {tmp_path} are unreadable"):
        take(tmp_path, 1)


def test_an_image_of_more_pixels_than_the_limit_is_refused_before_it_is_decoded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """PIL's own limit, 179 million, does not hold: sound scans and maps are larger."""
    buffer = io.BytesIO()
    Image.new("1", (20_000, 10_000)).save(buffer, "PNG")
    assert encoded.inspect(buffer.getvalue())[2:4] == (10_000, 20_000)
    monkeypatch.setenv("PIXELGEN_MAX_PIXELS", "100000000")
    with pytest.raises(UnreadableImage, match="20000 x 10000 pixels are more than 100,000,000, the limit"):
        encoded.inspect(buffer.getvalue())
    monkeypatch.setenv("PIXELGEN_MAX_PIXELS", "many")
    with pytest.raises(InputError, match="PIXELGEN_MAX_PIXELS='many' in the environment is no number"):
        encoded.inspect(buffer.getvalue())
