"""Feature alignment: loss and gradients by hand, the teacher's place in a run, and the cache of its features."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support.golden import relative
from support.runs import DIGITS, TINY, newest, rows, train
from support.teachers import write_teacher
from torch import Tensor

from pixelgen_fast import config as cfg
from pixelgen_fast import models
from pixelgen_fast.cli import main
from pixelgen_fast.data.index import PackedIndex
from pixelgen_fast.data.order import position
from pixelgen_fast.data.roots import open_root
from pixelgen_fast.data.source import Source
from pixelgen_fast.dino.network import load_dino
from pixelgen_fast.dino.teacher import Teacher
from pixelgen_fast.engine.alignment import FeatureAlignment, alignment_loss, build_alignment, resize_tokens
from pixelgen_fast.engine.features import FeatureCache
from pixelgen_fast.runs import draw
from pixelgen_fast.runs.checkpoint import read_weights

V3 = "vit_small_patch16_dinov3"
CPU = torch.device("cpu")
OWN = ("model.patch_depth=2", "optimizer.warmup_images=0", "optimizer.ema=[0.5]", f"alignment.teacher={V3}",
       "alignment.layer=1")  # fmt: skip


def command(folder: Path, images: int, *overrides: str) -> list[str]:
    return train(folder, images, *OWN, *overrides)


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_teacher(tmp_path_factory.mktemp("teachers") / "one", V3, 0)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path) -> Path:
    """64 images in one go."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert main(command(folder, 64, f"alignment.weights={teacher_folder}")) == 0
    return folder


def test_loss_and_gradients_by_hand() -> None:
    """Projector, cosine and their derivatives written out in float64."""
    torch.manual_seed(0)
    B, L, D, H, E = 3, 4, 5, 6, 7
    features = torch.randn(B, L, E, dtype=torch.float64)
    tokens = torch.randn(B, L, D, dtype=torch.float64, requires_grad=True)
    module = FeatureAlignment(
        lambda images, numbers: features, width=D, features=E, hidden=H, layer=1, weight=0.5, device=CPU
    ).double()
    loss_B = module(tokens, torch.empty(0), torch.empty(0))
    loss_B.mean().backward()

    x, f = tokens.detach().numpy().reshape(-1, D), features.numpy().reshape(-1, E)
    (w1, b1), (w2, b2), (w3, b3) = (
        (module.projector[i].weight.detach().numpy(), module.projector[i].bias.detach().numpy()) for i in (0, 2, 4)
    )

    def silu(a: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        s = 1 / (1 + np.exp(-a))
        return a * s, s * (1 + a * (1 - s))

    h1, slope1 = silu(x @ w1.T + b1)
    h2, slope2 = silu(h1 @ w2.T + b2)
    p = h2 @ w3.T + b3
    length_p, length_f = (np.linalg.norm(a, axis=1, keepdims=True) for a in (p, f))
    cosine = (p * f).sum(1, keepdims=True) / (length_p * length_f)
    assert np.allclose(loss_B.detach(), (1 - cosine).reshape(B, L).mean(1), rtol=0, atol=1e-14)
    assert loss_B.shape == (B,) and loss_B.dtype == torch.float64

    g3 = -(f / length_f - cosine * p / length_p) / length_p / (B * L)
    g2 = (g3 @ w3) * slope2
    g1 = (g2 @ w2) * slope1
    expected = {"0": (g1.T @ x, g1.sum(0)), "2": (g2.T @ h1, g2.sum(0)), "4": (g3.T @ h2, g3.sum(0))}
    for number, (weight, bias) in expected.items():
        linear = module.projector[int(number)]
        assert np.allclose(linear.weight.grad, weight, rtol=0, atol=1e-14)
        assert np.allclose(linear.bias.grad, bias, rtol=0, atol=1e-14)
    assert np.allclose(tokens.grad.reshape(-1, D), g1 @ w1, rtol=0, atol=1e-14)


def test_the_cosine_is_taken_in_float32() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(2, 3, 8).bfloat16(), torch.randn(2, 3, 8).half()
    loss = alignment_loss(a, b)
    assert loss.dtype == torch.float32
    assert relative(loss.double(), alignment_loss(a.double(), b.double())) < 1e-6


def test_grids_that_differ() -> None:
    """4 x 4 to 2 x 2 by block means; 2 x 2 to 4 x 4 by weights 1/4 and 3/4, held at the border."""
    tokens = torch.randn(2, 16, 3, dtype=torch.float64)
    grid = tokens.reshape(2, 4, 4, 3)
    assert torch.equal(resize_tokens(tokens, 16), tokens)
    blocks = grid.reshape(2, 2, 2, 2, 2, 3).mean(dim=(2, 4)).reshape(2, 4, 3)
    assert torch.allclose(resize_tokens(tokens, 4), blocks, rtol=0, atol=1e-14)
    weights = torch.tensor([[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]], dtype=torch.float64)
    larger = torch.einsum("ih,jw,bhwd->bijd", weights, weights, grid[:, :2, :2]).reshape(2, 16, 3)
    assert torch.allclose(resize_tokens(grid[:, :2, :2].reshape(2, 4, 3), 16), larger, rtol=0, atol=1e-14)


def test_a_run_trains_the_projector_and_reports_the_parts(whole_run: Path) -> None:
    found = rows(whole_run)
    assert [row["nimg"] for row in found] == [16, 32, 48, 64]
    for row in found:
        assert row["loss"] == pytest.approx(row["loss_flow"] + 0.5 * row["loss_alignment"], rel=1e-6)
        assert 0 < row["teacher_share"] < 1 and "loss_frequency" not in row
    assert found[-1]["loss_alignment"] < found[0]["loss_alignment"]


def test_what_a_checkpoint_holds(whole_run: Path) -> None:
    """Model and projector, and nothing of the teacher; averages of the model alone."""
    raw = read_weights(newest(whole_run), "raw")
    projector = {name for name in raw if not name.startswith("model.")}
    assert projector == {f"alignment.projector.{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")}
    assert raw["alignment.projector.0.weight"].shape == (36, 36)
    assert raw["alignment.projector.4.weight"].shape == (48, 36)
    own = draw.load(whole_run, "raw").model.state_dict()
    assert {name for name in raw if name.startswith("model.")} == {f"model.{name}" for name in own}
    averaged = read_weights(newest(whole_run), "ema_0.5")
    assert all(torch.equal(raw[name], averaged[name]) for name in projector)
    assert not torch.equal(raw["model.y_embed.weight"], averaged["model.y_embed.weight"])


def test_resume_is_bit_identical_and_export_loads(whole_run: Path, teacher_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    for images in (32, 64):
        assert main(command(folder, images, f"alignment.weights={teacher_folder}")) == 0
    for kind in ("raw", "ema_0.5"):
        expected, found = read_weights(newest(whole_run), kind), read_weights(newest(folder), kind)
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert [row["loss"] for row in rows(folder)] == [row["loss"] for row in rows(whole_run)]
    assert main(["export", str(folder), str(tmp_path / "out")]) == 0
    labels = torch.arange(3)
    assert torch.equal(draw.load(tmp_path / "out").draw(labels), draw.load(whole_run).draw(labels))


def test_resume_refuses_another_teacher(whole_run: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(command(whole_run, 64, "alignment.teacher=null")) == 2
    assert f"alignment.teacher ({V3} -> None); choose another run.dir" in capsys.readouterr().err


def test_two_ranks_at_stage_3_end_the_same(teacher_folder: Path, tmp_path: Path) -> None:
    """Two ranks fill one cache, and one rank reads it: weights to 1e-5."""
    folder = tmp_path / "two"
    settings = [f"alignment.weights={teacher_folder}", f"alignment.cache={tmp_path / 'cache'}", "train.zero_stage=3"]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "pixelgen_fast"]
    process = subprocess.run(
        [sys.executable, *launcher, *command(folder, 64, *settings)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert process.returncode == 0, process.stderr
    assert np.count_nonzero(np.load(tmp_path / "cache" / "seals.npy")) == 64
    assert main(command(tmp_path / "one", 64, *settings)) == 0
    expected, found = (read_weights(newest(path), "raw") for path in (tmp_path / "one", folder))
    assert expected.keys() == found.keys()
    for name in expected:
        assert relative(found[name], expected[name]) < 1e-5, name


def test_settings_that_do_not_fit(teacher_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    weights = f"alignment.weights={teacher_folder}"
    assert main(command(tmp_path / "deep", 16, weights, "alignment.layer=3")) == 2
    assert "alignment.layer is 3 and the model has 2 patch blocks and no DINO student; set" in capsys.readouterr().err
    wrong = {
        "alignment.layer=-1": "alignment.layer is -1",
        "alignment.weight=0": "alignment.weight is 0",
        "alignment.projector_hidden=0": "alignment.projector_hidden is 0",
        "objective.frequency_weight=-1": "objective.frequency_weight is -1",
        "objective.frequency_quality=0": "objective.frequency_quality is 0",
    }
    for override, message in wrong.items():
        with pytest.raises(cfg.ConfigError, match=message):
            cfg.load(DIGITS, [override], models.model_schema)
    with pytest.raises(cfg.ConfigError, match="alignment.teacher is null"):
        cfg.load(DIGITS, [weights], models.model_schema)
    with pytest.raises(cfg.ConfigError, match="set data.flip=false"):
        cfg.load(DIGITS, ["alignment.teacher=x", "alignment.cache=y", "data.flip=true"], models.model_schema)


def test_the_projector_is_a_function_of_the_seed(teacher_folder: Path) -> None:
    overrides = [*TINY, *OWN, f"alignment.weights={teacher_folder}", "alignment.projector_hidden=10"]
    index = open_root("digits")

    def projector(seed: int) -> Tensor:
        config = cfg.load(DIGITS, [*overrides, f"run.seed={seed}"], models.model_schema)
        torch.manual_seed(torch.seed())
        return build_alignment(config, models.build_model(config, 10), index, CPU).projector[2].weight

    assert projector(0).shape == (10, 10)
    assert torch.equal(projector(0), projector(0)) and not torch.equal(projector(0), projector(1))
    config = cfg.load(DIGITS, [*overrides, "alignment.teacher=null", "alignment.weights=null"], models.model_schema)
    assert build_alignment(config, models.build_model(config, 10), index, CPU) is None


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


def test_a_run_with_a_cache_repeats_itself(teacher_folder: Path, tmp_path: Path) -> None:
    """An empty cache and a full one give the same weights, bit for bit."""
    settings = [f"alignment.weights={teacher_folder}", f"alignment.cache={tmp_path / 'cache'}"]
    for name in ("empty", "full"):
        assert main(command(tmp_path / name, 32, *settings)) == 0
    empty, full = (read_weights(newest(tmp_path / name), "raw") for name in ("empty", "full"))
    assert all(torch.equal(empty[name], full[name]) for name in empty)
    assert np.count_nonzero(np.load(tmp_path / "cache" / "seals.npy")) == 32
