import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.svm import SVC

from pixelgen_fast.data.digits import load_real, to_8x8, write_digits
from pixelgen_fast.data.index import open_index


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write_digits(tmp_path_factory.mktemp("cache"))


def test_the_tree_holds_the_real_digits(written):
    index = open_index(written)
    assert index.classes == [str(k) for k in range(10)]
    assert np.array_equal(np.bincount(index.labels), np.bincount(load_digits().target))
    images, labels = load_real()
    for i in range(0, len(index), 97):
        number = int(index.path(i).rpartition("/")[2].removesuffix(".png"))
        with Image.open(index.path(i)) as file:
            assert file.mode == "RGB"
            assert np.array_equal(np.asarray(file), images[number])
        assert index.label(i) == labels[number]


def test_8x8_features_are_those_of_scikit_learn(written):
    images, labels = load_real()
    source = load_digits()
    assert images.shape == (1797, 16, 16, 3) and images.dtype == np.uint8
    assert np.array_equal(labels, source.target)
    features = to_8x8(images)
    assert features.shape == (1797, 64) and features.min() >= 0 and features.max() <= 16
    # The bicubic filter softens strokes by 0.67 of 16 levels on average. A classifier that knows only the original
    # 8x8 data reads the features as well as data it never saw (0.988 on these).
    assert np.abs(features - source.data).mean() < 0.75
    classifier = SVC(gamma=0.001).fit(source.data[::2], source.target[::2])
    assert classifier.score(features[1::2], labels[1::2]) > 0.97


def test_8x8_of_flat_images_is_their_level():
    levels = np.arange(0, 256, 15, dtype=np.uint8)
    images = np.broadcast_to(levels[:, None, None, None], (len(levels), 16, 16, 3))
    assert np.allclose(to_8x8(images), (levels * 16.0 / 255)[:, None])


@pytest.mark.parametrize("bad", [np.zeros((2, 8, 8, 3), np.uint8), np.zeros((2, 16, 16, 3), np.float32)])
def test_8x8_refuses_other_arrays(bad):
    with pytest.raises(ValueError, match="uint8"):
        to_8x8(bad)


def test_a_damaged_tree_is_written_anew(written, tmp_path):
    target = tmp_path / "digits"
    shutil.copytree(written, target)
    before = {p.relative_to(target) for p in target.rglob("*.png")}
    for damage in (
        lambda: (target / "3" / min(p.name for p in (target / "3").iterdir())).unlink(),
        lambda: shutil.rmtree(target / "7"),
        lambda: next((target / "5").iterdir()).write_bytes(b""),
    ):
        damage()
        assert write_digits(tmp_path) == target
        assert {p.relative_to(target) for p in target.rglob("*.png")} == before
        assert all(p.stat().st_size > 0 for p in target.rglob("*.png"))
    assert {p.name for p in tmp_path.iterdir()} == {"digits", "digits.lock"}


def test_writers_at_once_leave_one_whole_tree(tmp_path):
    with ThreadPoolExecutor(3) as pool:
        roots = list(pool.map(lambda _: write_digits(tmp_path), range(3)))
    assert set(roots) == {tmp_path / "digits"}
    assert len(list(roots[0].rglob("*.png"))) == 1797


def test_the_cache_directory_is_named_by_the_environment(written, tmp_path, monkeypatch):
    monkeypatch.setenv("PIXELGEN_CACHE", str(tmp_path / "own"))
    shutil.copytree(written, tmp_path / "own" / "digits")
    assert write_digits() == tmp_path / "own" / "digits"
    monkeypatch.delenv("PIXELGEN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    shutil.copytree(written, tmp_path / "xdg" / "pixelgen_fast" / "digits")
    assert write_digits() == tmp_path / "xdg" / "pixelgen_fast" / "digits"
