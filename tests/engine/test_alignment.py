"""Feature alignment: loss and gradients by hand, and the teacher's place in a run."""

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
from torch import Tensor, nn

from pixelgen_fast import config as cfg
from pixelgen_fast import models
from pixelgen_fast.cli import main
from pixelgen_fast.data.roots import open_root
from pixelgen_fast.engine.alignment import (
    ConvProjector,
    FeatureAlignment,
    alignment_loss,
    build_alignment,
    make_projector,
    normalise_over_tokens,
    resize_tokens,
)
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
    projector = make_projector("mlp", D, E, H)
    module = FeatureAlignment(lambda *_: features, projector, width=D, layer=1, weight=0.5, device=CPU).double()
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
    a, b = torch.randn(2, 3, 768).bfloat16().requires_grad_(), (1e3 * torch.randn(2, 3, 768)).half()
    loss = alignment_loss(a, b)
    assert loss.dtype == torch.float32
    exact = a.detach().double().requires_grad_()
    wanted = alignment_loss(exact, b.double())
    assert relative(loss, wanted) < 1e-6
    (gradient,), (expected,) = (torch.autograd.grad(x.sum(), y) for x, y in ((loss, a), (wanted, exact)))
    assert relative(gradient, expected) < 2**-8  # its own digits


def test_a_convolution_over_the_grid_by_hand() -> None:
    """Nine products for each token, 0 beyond the border."""
    projector = ConvProjector(3, 5).double()
    tokens = torch.randn(2, 16, 3, dtype=torch.float64)
    weight, bias = (p.detach().numpy() for p in (projector.conv.weight, projector.conv.bias))
    grid = np.pad(tokens.numpy().reshape(2, 4, 4, 3), ((0, 0), (1, 1), (1, 1), (0, 0)))
    expected = np.zeros((2, 4, 4, 5)) + bias
    for i, j in np.ndindex(3, 3):
        expected += grid[:, i : i + 4, j : j + 4] @ weight[:, :, i, j].T
    np.testing.assert_allclose(projector(tokens).detach(), expected.reshape(2, 16, 5), rtol=0, atol=1e-13)


@pytest.mark.parametrize("share", [0.0, 0.6, 1.0])
def test_features_are_normalised_over_the_tokens(share: float) -> None:
    f = 5 + torch.randn(2, 9, 4, dtype=torch.float64)
    expected = (f.numpy() - share * f.numpy().mean(axis=1, keepdims=True)) / f.numpy().std(axis=1, keepdims=True)
    np.testing.assert_allclose(normalise_over_tokens(f, share), expected, rtol=1e-5, atol=1e-5)
    half = normalise_over_tokens(f.half(), share)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, normalise_over_tokens(f.half().double(), share).float(), rtol=1e-4, atol=1e-4)
    assert normalise_over_tokens(torch.ones(1, 9, 4), share).isfinite().all()
    module = FeatureAlignment(lambda *_: f, nn.Identity(), width=4, layer=1, weight=1.0, device=CPU, spatial_norm=share)
    tokens = torch.randn(2, 9, 4, dtype=torch.float64)
    wanted = alignment_loss(tokens, torch.from_numpy(expected))
    torch.testing.assert_close(module(tokens, torch.empty(0), torch.empty(0)), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["mlp", "conv", "none"])
def test_from_the_stop_on_the_loss_is_zero_and_the_teacher_rests(kind: str) -> None:
    asked, numbers = [], torch.tensor([5, 6, 7])
    module = FeatureAlignment(
        lambda images, numbers: asked.append(numbers) or torch.ones(3, 4, 6) * torch.arange(6),
        make_projector(kind, 6, 6, 5), width=6, layer=1, weight=1.0, device=CPU, stop=7,
    )  # fmt: skip
    tokens = torch.randn(3, 4, 6, requires_grad=True)
    loss_B = module(tokens, torch.empty(0), numbers)
    module.stop = None
    whole_B = module(tokens, torch.empty(0), numbers)
    assert torch.equal(loss_B[:2], whole_B[:2]) and loss_B[2] == 0 and len(asked) == 2
    loss_B.sum().backward()
    assert tokens.grad[:2].any() and not tokens.grad[2].any()
    module.zero_grad()
    nothing_B = module(None, torch.empty(0), numbers)
    assert torch.equal(nothing_B, torch.zeros(3)) and len(asked) == 2
    if kind != "none":
        nothing_B.sum().backward()
        assert all(p.grad is not None and not p.grad.any() for p in module.parameters())
    module.stop = 7
    assert [module.acts_at(first) for first in (0, 6, 7, 8)] == [True, True, False, False]
    assert [module.share(*ends) for ends in ((0, 7), (4, 8), (6, 10), (7, 9))] == [1, 0.75, 0.25, 0]


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


def test_a_run_whose_alignment_stops_resumes_bit_for_bit(teacher_folder: Path, tmp_path: Path) -> None:
    """It stops inside a micro-batch of images 40 to 47; runs that end before, in and after that step go on alike."""
    settings = [f"alignment.weights={teacher_folder}", "alignment.stop_images=44", "alignment.projector=conv",
                "alignment.spatial_norm=1", "optimizer.weight_decay=0.1"]  # fmt: skip
    whole = tmp_path / "whole"
    assert main(command(whole, 80, *settings)) == 0
    for parts in ((32, 80), (48, 80), (64, 80)):
        folder = tmp_path / str(parts[0])
        for images in parts:
            assert main(command(folder, images, *settings)) == 0
        for kind in ("raw", "ema_0.5"):
            expected, found = read_weights(newest(whole), kind), read_weights(newest(folder), kind)
            assert all(torch.equal(expected[name], found[name]) for name in expected)
        assert [row["loss"] for row in rows(folder)] == [row["loss"] for row in rows(whole)]
    found = rows(whole)
    assert [row["aligned_share"] for row in found] == [1, 1, 0.75, 0, 0]
    for row in found[:3]:
        expected = row["loss_flow"] + 0.5 * row["aligned_share"] * row["loss_alignment"]
        assert row["loss"] == pytest.approx(expected, rel=1e-6)
    for row in found[3:]:
        assert row["loss_alignment"] is None and row["loss"] == row["loss_flow"] and row["teacher_share"] == 0
    assert found[2]["loss_alignment"] == pytest.approx(found[1]["loss_alignment"], rel=0.2)  # a mean over 12 images


def test_resume_refuses_another_teacher(whole_run: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(command(whole_run, 64, "alignment.teacher=null")) == 2
    assert f"alignment.teacher ({V3} -> None); choose another run.dir" in capsys.readouterr().err


def test_two_ranks_at_stage_3_end_the_same(teacher_folder: Path, tmp_path: Path) -> None:
    """Two ranks fill one cache, and one rank reads it: weights to 1e-5. In the last step only one of the two aligns."""
    folder = tmp_path / "two"
    settings = [f"alignment.weights={teacher_folder}", f"alignment.cache={tmp_path / 'cache'}", "train.zero_stage=3",
                "alignment.stop_images=52"]  # fmt: skip
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "pixelgen_fast"]
    process = subprocess.run(
        [sys.executable, *launcher, *command(folder, 64, *settings)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert process.returncode == 0, process.stderr
    assert np.count_nonzero(np.load(tmp_path / "cache" / "seals.npy")) == 56
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
    for given in (weights, "alignment.stop_images=9", "alignment.spatial_norm=1"):
        with pytest.raises(cfg.ConfigError, match=f"{given.split('=')[0]} is given, but alignment.teacher is null"):
            cfg.load(DIGITS, [given], models.model_schema)
    with pytest.raises(cfg.ConfigError, match="alignment.projector conv has no hidden layer"):
        cfg.load(DIGITS, ["alignment={projector: conv, projector_hidden: 8}"], models.model_schema)
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


def test_a_run_with_a_cache_repeats_itself(teacher_folder: Path, tmp_path: Path) -> None:
    """An empty cache and a full one give the same weights, bit for bit."""
    settings = [f"alignment.weights={teacher_folder}", f"alignment.cache={tmp_path / 'cache'}"]
    for name in ("empty", "full"):
        assert main(command(tmp_path / name, 32, *settings)) == 0
    empty, full = (read_weights(newest(tmp_path / name), "raw") for name in ("empty", "full"))
    assert all(torch.equal(empty[name], full[name]) for name in empty)
    assert np.count_nonzero(np.load(tmp_path / "cache" / "seals.npy")) == 32
