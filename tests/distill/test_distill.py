"""Self-distillation: losses by hand, what views and masks do, and a teacher from the command line to `load_dino`."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.special import log_softmax, softmax
from sklearn.model_selection import train_test_split

from pixelgen_fast.cli import main
from pixelgen_fast.config import ConfigError
from pixelgen_fast.data.digits import load_real
from pixelgen_fast.dino.network import load_dino
from pixelgen_fast.dino.teacher import Teacher
from pixelgen_fast.distill.judge import Judge, load_images, split
from pixelgen_fast.distill.learner import ARCHITECTURE, Learner
from pixelgen_fast.distill.losses import momentum, patch_loss, sinkhorn, spread_loss, view_loss
from pixelgen_fast.distill.schema import TeacherConfig, Views, load
from pixelgen_fast.distill.views import draw_masks, draw_views
from pixelgen_fast.eval.neighbours import knn_accuracy

CONFIG = str(Path(__file__).parents[2] / "configs" / "teacher_digits.yaml")
TINY = ["network.embed_dim=24", "network.depth=1", "network.num_heads=2", "objective.prototypes=16",
        "objective.head_hidden=16", "objective.head_width=8", "views.small=1", "train.batch=16",
        "log.every_images=32", "log.judge_every_images=64", "optimizer.warmup_images=0"]  # fmt: skip


def settings(*overrides: str) -> TeacherConfig:
    return load(CONFIG, [*TINY, *overrides])


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "teacher"
    assert main(["teacher", CONFIG, *TINY, f"run.dir={folder}", "train.images=128"]) == 0
    return folder


def normals(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def test_view_loss_by_hand() -> None:
    V, G, B, K, T = 4, 2, 3, 5, 0.3
    logits, p = normals(V, B, K), softmax(normals(G, B, K, seed=1), axis=-1)
    pairs = [(g, v) for g in range(G) for v in range(V) if g != v]
    expected = -np.mean([(p[g, b] * log_softmax(logits[v, b] / T)).sum() for g, v in pairs for b in range(B)])
    assert view_loss(torch.from_numpy(logits), torch.from_numpy(p), T).item() == pytest.approx(expected, rel=1e-12)


def test_patch_loss_by_hand() -> None:
    logits, p = normals(7, 5), softmax(normals(7, 5, seed=1), axis=-1)
    expected = -np.mean([(p[m] * log_softmax(logits[m] / 0.2)).sum() for m in range(7)])
    assert patch_loss(torch.from_numpy(logits), torch.from_numpy(p), 0.2).item() == pytest.approx(expected, rel=1e-12)
    none = torch.empty(0, 5, requires_grad=True)
    patch_loss(none, torch.empty(0, 5), 0.2).backward()
    assert none.grad.shape == (0, 5)


def test_spread_loss_by_hand() -> None:
    """-log of the distance to the nearest other one on the sphere; lengths do not count."""
    f = normals(6, 4)
    unit = f / np.linalg.norm(f, axis=1, keepdims=True)
    distance = np.linalg.norm(unit[:, None] - unit[None], axis=-1) + np.diag([np.inf] * 6)
    expected = -np.log(distance.min(axis=1)).mean()
    assert spread_loss(torch.from_numpy(f)).item() == pytest.approx(expected, rel=1e-6)
    assert spread_loss(torch.from_numpy(f * np.arange(1, 7)[:, None])).item() == pytest.approx(expected, rel=1e-6)


def test_sinkhorn_marginals() -> None:
    """Samples sum to 1 after any number of iterations, prototypes to N / K in the limit, which is the only matrix
    diag(u) exp(logits / T) diag(v) with those marginals: found here by scaling exp itself in float64."""
    N, K, T = 12, 5, 0.4
    logits = normals(N, K)
    few, many = (sinkhorn(torch.from_numpy(logits), T, n).numpy() for n in (3, 300))
    np.testing.assert_allclose(few.sum(1), 1, rtol=1e-12)
    np.testing.assert_allclose(many.sum(1), 1, rtol=1e-12)
    np.testing.assert_allclose(many.sum(0), N / K, rtol=1e-9)
    q = np.exp(logits / T)
    for _ in range(300):
        q *= (N / K) / q.sum(0)
        q /= q.sum(1, keepdims=True)
    np.testing.assert_allclose(many, q, rtol=1e-9)
    assert torch.isfinite(sinkhorn(torch.from_numpy(logits * 1e4).float(), 0.01)).all()


def test_sinkhorn_undoes_collapse() -> None:
    """Where all samples prefer one prototype, plain softmax gives all to it; here each prototype keeps its share."""
    logits = torch.from_numpy(normals(64, 8))
    logits[:, 0] += 20
    assert torch.softmax(logits, dim=1)[:, 0].min() > 0.99
    assert sinkhorn(logits, 1.0, 20).sum(0).max() < 9


def test_momentum_rises_along_half_a_cosine() -> None:
    assert momentum(0.9, 0, 100) == pytest.approx(0.9) and momentum(0.9, 100, 100) == pytest.approx(1.0)
    assert momentum(0.9, 50, 100) == pytest.approx(0.95)
    assert momentum(0.9, 25, 100) == pytest.approx(1 - 0.1 * (1 + math.sqrt(0.5)) / 2)


def test_a_view_without_distortion_is_the_image() -> None:
    images = torch.rand(5, 3, 16, 16)
    still = Views(rotation=0, aspect=0, warp=0, brightness=0, noise=0)
    torch.testing.assert_close(draw_views(images, 16, (1.0, 1.0), still, torch.Generator()), images, atol=1e-5, rtol=0)


def test_a_view_shows_its_share_of_the_area() -> None:
    """A coordinate ramp as the image: a view of a quarter spans half of each side, somewhere inside the image."""
    ramp = ((torch.arange(64) + 0.5) / 64).expand(64, 64)
    images = torch.stack([ramp, ramp.T, ramp]).expand(200, 3, 64, 64)
    still = Views(rotation=0, aspect=0, warp=0, brightness=0, noise=0)
    seen = draw_views(images, 32, (0.25, 0.25), still, torch.Generator().manual_seed(0))
    x, y = seen[:, 0, 0], seen[:, 1, :, 0]
    for axis in (x, y):
        steps = axis.diff(dim=1)
        torch.testing.assert_close(steps, torch.full_like(steps, 1 / 64), atol=1e-4, rtol=0)
        assert axis.min() >= 0 and axis.max() <= 1
        assert axis[:, 0].std() == pytest.approx(0.5 / math.sqrt(12), rel=0.15)
    assert abs(np.corrcoef(x[:, 0], y[:, 0])[0, 1]) < 0.3


def test_views_are_a_function_of_the_seed_and_flip_only_when_asked() -> None:
    images = torch.rand(64, 3, 16, 16)

    def draw(seed: int, **kwargs: float) -> torch.Tensor:
        return draw_views(images, 8, (0.4, 1.2), Views(**kwargs), torch.Generator().manual_seed(seed))

    assert torch.equal(draw(0), draw(0)) and not torch.equal(draw(0), draw(1))
    assert draw(0).min() >= 0 and draw(0).max() <= 1
    still = dict(rotation=0, aspect=0, warp=0, brightness=0, noise=0)
    ramp = (torch.arange(16) / 16).expand(64, 3, 16, 16)
    for flip, low, high in ((False, 0, 0), (True, 16, 48)):
        seen = draw_views(ramp, 16, (0.5, 0.5), Views(flip=flip, **still), torch.Generator().manual_seed(0))
        assert low <= (seen[:, 0, 0, -1] < seen[:, 0, 0, 0]).sum() <= high


def test_masks_hide_what_they_are_asked_to() -> None:
    views = Views(masked=0.5, mask_share=(0.25, 0.5))
    hidden = draw_masks(4000, 16, views, torch.Generator().manual_seed(0)).sum(dim=1)
    assert set(hidden.tolist()) == {0, 4, 5, 6, 7, 8}
    assert (hidden > 0).sum() == 2000 and hidden[:2000].count_nonzero().item() == pytest.approx(1000, abs=100)
    assert hidden[hidden > 0].double().mean().item() == pytest.approx(6, abs=0.15)
    always = Views(masked=1.0, mask_share=(0.01, 0.01))
    assert draw_masks(50, 16, always, torch.Generator().manual_seed(0)).sum(dim=1).tolist() == [1] * 50


def test_the_learner_is_the_network_of_timm_where_nothing_is_masked() -> None:
    config = settings()
    learner, images = Learner(config).eval(), torch.randn(3, 3, 16, 16)
    classes, patches = learner(images)
    expected = learner.network.forward_features(images)
    torch.testing.assert_close(classes, expected[:, 0])
    torch.testing.assert_close(patches, expected[:, 5:])
    hidden = torch.zeros(3, 16, dtype=torch.bool)
    hidden[:, 3] = True
    other = images.clone()
    other[:, :, 0:4, 12:16] = 7.0  # patch 3 is the last of the first row
    torch.testing.assert_close(learner(images, hidden), learner(other, hidden))
    assert not torch.allclose(learner(images)[0], learner(other)[0])


def test_the_split_is_that_of_the_digits_judge() -> None:
    """As eval/digits.py makes it, of images in its order: half A trains the teacher."""
    images, labels = load_images(settings())
    real, real_labels = load_real()
    np.testing.assert_array_equal(images, real)
    kept, held = split(labels, 0.5)
    a, b = train_test_split(np.arange(1797), test_size=0.5, stratify=real_labels, random_state=0)
    np.testing.assert_array_equal(kept, a)
    np.testing.assert_array_equal(held, b)


def test_a_teacher_from_the_command_line(finished: Path) -> None:
    """What the run leaves; the saved network is one that `load_dino` opens, whose patch tokens, through `Teacher` and
    its preprocessing of uint8 images, classify the held-out images exactly as the last line of the metrics says."""
    left = {"teacher.yaml", "metrics.jsonl", "curves.png", "report.json", "teacher"}
    assert {p.name for p in finished.iterdir()} == left
    assert np.asarray(Image.open(finished / "curves.png").convert("L")).std() > 5
    written = rows(finished)
    assert [r["nimg"] for r in written] == [32, 64, 96, 128]
    assert ["knn_class" in r for r in written] == [False, True, False, True]
    assert all(math.isfinite(r["loss"]) and r["loss_views"] > 0 and r["loss_patches"] > 0 for r in written)

    teacher = Teacher(load_dino(ARCHITECTURE, str(finished / "teacher")), 4, "cpu")
    assert (teacher.width, teacher.side, teacher.prefix) == (24, 16, 5)
    images, labels = (torch.from_numpy(part) for part in load_real())
    kept, held = split(labels.numpy(), 0.5)
    features = teacher(images)
    assert features.shape == (1797, 16, 24)
    mean = features.mean(dim=1)
    found = knn_accuracy(mean[kept], labels[kept], mean[held], labels[held], k=20)
    assert found == pytest.approx(written[-1]["knn_patches"], abs=3 / len(held))
    report = json.loads((finished / "report.json").read_text())
    assert report["knn_patches"] == written[-1]["knn_patches"] and report["held_out"] == len(held)
    judge = Judge(images.numpy(), labels.numpy(), kept, held, 20, torch.device("cpu"))
    torch.testing.assert_close(teacher.preprocess(images[kept]), judge.normalise(judge.kept), atol=1e-5, rtol=0)


def test_the_same_seed_gives_the_same_teacher(finished: Path, tmp_path: Path) -> None:
    def losses(folder: Path) -> list[float]:
        return [r["loss"] for r in rows(folder)]

    for seed in (0, 1):
        folder = tmp_path / str(seed)
        assert main(["teacher", CONFIG, *TINY, f"run.dir={folder}", "train.images=128", f"run.seed={seed}"]) == 0
        assert (losses(folder) == losses(finished)) == (seed == 0)


def test_a_folder_in_use_is_left_alone(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (finished / "metrics.jsonl").read_bytes()
    assert main(["teacher", CONFIG, *TINY, f"run.dir={finished}"]) == 2
    assert "holds a trained teacher already; delete it, or choose another run.dir" in capsys.readouterr().err
    assert (finished / "metrics.jsonl").read_bytes() == before
    (tmp_path / "checkpoints").mkdir()
    assert main(["teacher", CONFIG, *TINY, f"run.dir={tmp_path}"]) == 2
    assert "holds checkpoints, not of a teacher" in capsys.readouterr().err


def test_a_stopped_run_says_so_and_starts_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["teacher", CONFIG, *TINY, f"run.dir={tmp_path}", "train.images=64"]
    with monkeypatch.context() as patched:
        patched.setattr("pixelgen_fast.signals.StopRequest.requested", True)
        assert main(command) == 2
    assert "after 16 of 64 images; run it again to start anew" in capsys.readouterr().err
    assert not (tmp_path / "teacher").exists()
    assert main(command) == 0
    assert [r["nimg"] for r in rows(tmp_path)] == [32, 64] and (tmp_path / "teacher").is_dir()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lrr=1", "optimizer.lrr: unknown key; did you mean optimizer.lr?"),
        ("optimiser.lr=1", "optimiser: unknown key; did you mean optimizer?"),
        ("network.depth=four", "network.depth: Value 'four'"),
        ("run.device=tpu", "run.device: .*'cuda'"),
        ("train", "write key.sub=value"),
        ("network.patch_size=5", "data.image_size 16 is not a multiple of network.patch_size 5"),
        ("network.num_heads=5", "network.embed_dim 24 is not a multiple of 4 x network.num_heads 5"),
        ("objective.momentum=1", r"objective.momentum is 1.0; it lies in \(0, 1\)"),
        ("views.large_area=[1.2,0.5]", r"views.large_area is \[1.2, 0.5\]; it must rise"),
        ("views.mask_share=[0.5,1.5]", r"views.mask_share is \[0.5, 1.5\]; it lies in \(0, 1\]"),
        ("views.masked=2", r"views.masked is 2.0; it lies in \(0, 1\]"),
        ("views.masked=0.02", "views.masked 0.02 of 2 x train.batch 16 views are fewer than two"),
        ("train.images=0", "train.images is 0; it must be above 0"),
        ("views.warp=-1", "views.warp is -1.0; it must not be negative"),
        ("train.batch=1", "train.batch is 1; it must be at least 2"),
        ("optimizer.warmup_images=1000000", "optimizer.warmup_images 1000000 is not below train.images"),
    ],
)
def test_refusals_name_the_key_and_the_fix(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings(override)


def test_refusals_of_files_and_images(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such configuration file; there are .*teacher_digits.yaml"):
        load(Path(CONFIG).with_name("teacher_digit.yaml"), [])
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ConfigError, match="is a mapping of sections"):
        load(tmp_path / "list.yaml", [])
    with pytest.raises(ConfigError, match="digits has 16 x 16 pixels and data.image_size is 32"):
        load_images(settings("data.image_size=32"))
    for name, side in (("a", 16), ("b", 20)):
        (tmp_path / "tree" / name).mkdir(parents=True)
        Image.new("RGB", (side, side)).save(tmp_path / "tree" / name / "0.png")
    with pytest.raises(ConfigError, match=r"b/0.png has 20 x 20 pixels .*pixelgen data pack --size 16"):
        load_images(settings(f"data.root={tmp_path / 'tree'}"))
