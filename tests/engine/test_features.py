"""The cache of a teacher's features: what it gives, what it makes again, and what it refuses."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from support.teachers import write_teacher
from torch import Tensor

from pixelgen_fast import config as cfg
from pixelgen_fast.data.index import PackedIndex
from pixelgen_fast.data.order import position
from pixelgen_fast.data.source import Source
from pixelgen_fast.dino.network import load_dino
from pixelgen_fast.dino.teacher import Teacher
from pixelgen_fast.engine.features import FeatureCache

V3 = "vit_small_patch16_dinov3"


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_teacher(tmp_path_factory.mktemp("teachers") / "one", V3, 0)


class Counted:
    """A teacher that counts the images it is shown."""

    def __init__(self, folder: Path) -> None:
        self.teacher, self.shown = Teacher(load_dino(V3, str(folder)), 4, "cpu"), 0
        self.grid, self.width, self.fingerprint = self.teacher.grid, self.teacher.width, self.teacher.fingerprint

    def __call__(self, images: Tensor) -> Tensor:
        self.shown += len(images)
        return self.teacher(images)


def packed(root: Path, count: int = 5, classes: tuple[str, ...] = ("a", "b")) -> PackedIndex:
    root.mkdir()
    np.save(root / "images.npy", np.random.default_rng(0).integers(0, 256, (count, 16, 16, 3), dtype=np.uint8))
    np.save(root / "labels.npy", np.arange(count) % len(classes))
    (root / "classes.json").write_text(json.dumps(classes))
    return PackedIndex(root)


def images_of(index: PackedIndex, cache: FeatureCache, numbers: Tensor) -> Tensor:
    pixels = np.load(index.root / "images.npy")
    return torch.from_numpy(pixels[[position(cache.sampler.seed, int(n), len(index)) for n in numbers]])


def test_cached_features_are_the_teachers(teacher_folder: Path, tmp_path: Path) -> None:
    """Each image is shown to the teacher once, over epochs, processes and seeds; float16 is all that it costs."""
    index, folder = packed(tmp_path / "data"), tmp_path / "cache"
    first = Counted(teacher_folder)
    cache = FeatureCache(folder, first, index, seed=3, size=16, crop="none")
    by_image = {}
    for numbers in torch.arange(15).split(5):
        images = images_of(index, cache, numbers)
        found = cache(images, numbers)
        assert found.dtype == torch.float16
        assert torch.allclose(found.float(), first.teacher(images), rtol=2**-11, atol=2**-24)
        for image, features in zip(images, found, strict=True):
            assert torch.equal(by_image.setdefault(image.numpy().tobytes(), features), features)
    assert first.shown == len(by_image) == 5

    second = Counted(teacher_folder)
    again = FeatureCache(folder, second, index, seed=8, size=16, crop="none")
    for numbers in torch.arange(5, 13).split(3):
        images = images_of(index, again, numbers)
        for image, features in zip(images, again(images, numbers), strict=True):
            assert torch.equal(by_image[image.numpy().tobytes()], features)
    balanced = FeatureCache(folder, second, index, seed=8, size=16, crop="none", class_balanced=True)
    source = Source(index, 8, size=16, crop="none", halvings=0, class_balanced=True)
    images = torch.from_numpy(np.load(index.root / "images.npy")[[item.index for item in source.items(range(20))]])
    for image, features in zip(images, balanced(images, torch.arange(20)), strict=True):
        assert torch.equal(by_image[image.numpy().tobytes()], features)
    assert second.shown == 0


def test_damaged_rows_and_other_images_are_made_again(teacher_folder: Path, tmp_path: Path) -> None:
    index, folder, numbers = packed(tmp_path / "data"), tmp_path / "cache", torch.arange(5)
    counted = Counted(teacher_folder)
    cache = FeatureCache(folder, counted, index, seed=3, size=16, crop="none")
    images = images_of(index, cache, numbers)
    expected = cache(images, numbers)
    stored = np.load(folder / "features.npy", mmap_mode="r+")
    stored[2, 0, 0] += 1
    stored.flush()
    assert torch.equal(cache(images, numbers), expected) and counted.shown == 5 + 1
    assert torch.equal(cache(images, numbers), expected) and counted.shown == 6
    other = images.clone()
    other[1] = 255 - other[1]
    changed = cache(other, numbers)
    assert counted.shown == 7 and not torch.equal(changed[1], expected[1])
    assert torch.equal(changed[[0, 2, 3, 4]], expected[[0, 2, 3, 4]])


def test_a_cache_refuses_what_it_was_not_made_for(teacher_folder: Path, tmp_path: Path) -> None:
    index, folder = packed(tmp_path / "data"), tmp_path / "cache"
    FeatureCache(folder, Counted(teacher_folder), index, seed=0, size=16, crop="none")
    other = Counted(write_teacher(tmp_path / "other", V3, 1))
    with pytest.raises(cfg.ConfigError, match="filled for something else: teacher .* choose another folder"):
        FeatureCache(folder, other, index, seed=0, size=16, crop="none")
    relabelled = packed(tmp_path / "relabelled", classes=("a", "c"))
    with pytest.raises(cfg.ConfigError, match="filled for something else: data [0-9a-f]+ -> [0-9a-f]+; choose"):
        FeatureCache(folder, Counted(teacher_folder), relabelled, seed=0, size=16, crop="none")
    larger = packed(tmp_path / "larger", count=6)
    with pytest.raises(cfg.ConfigError, match=r"features \[5, 16, 48\] -> \[6, 16, 48\]"):
        FeatureCache(folder, Counted(teacher_folder), larger, seed=0, size=16, crop="none")
    with pytest.raises(cfg.ConfigError, match="image_size 16 -> 32; crop none -> adm"):
        FeatureCache(folder, Counted(teacher_folder), index, seed=0, size=32, crop="adm")
    with pytest.raises(cfg.ConfigError, match="is no feature cache"):
        FeatureCache(tmp_path / "data", Counted(teacher_folder), index, seed=0, size=16, crop="none")
    FeatureCache(folder, Counted(teacher_folder), index, seed=9, size=16, crop="none")
