"""The validation loss against its formula written out, over resumes, ranks and both kinds of systems."""

import shutil
from pathlib import Path

import pytest
import torch
from pixelgen_kernels import philox
from support.ranks import start_ranks
from support.runs import rows, train

from pixelgen_fast import config as cfg
from pixelgen_fast.cli import main
from pixelgen_fast.data.cropped import read_cropped
from pixelgen_fast.data.held_out import looked_at
from pixelgen_fast.engine.assemble import open_data
from pixelgen_fast.engine.validation import TIMES
from pixelgen_fast.models import model_schema
from pixelgen_fast.runs import draw

HELD = ("data.validation.share=0.1", "data.validation.images=20", "data.validation.batch=8")
OWN = ("model.patch_depth=1", "optimizer.warmup_images=0", "optimizer.ema=[0.5]", "data.validation.every_images=32")


def validated(folder: Path) -> list[dict]:
    return [row for row in rows(folder) if "validation_loss" in row]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert main(train(folder, 80, *OWN, *HELD)) == 0
    return folder


def by_formula(folder: Path, weights: str) -> torch.Tensor:
    """mean |v - model(t x + (1 - t) e, t, y)|^2 of the first 20 images that are held out, at each of eight times."""
    config = cfg.load(folder / "config.yaml", (), model_schema)
    _, held = open_data(config.data)
    numbers = torch.tensor(list(looked_at(held, 0))[:20])
    loaded = draw.load(folder, weights)
    x = torch.stack([torch.from_numpy(read_cropped(held, i, 16)) for i in numbers.tolist()])
    x = (x.double() / 127.5 - 1).permute(0, 3, 1, 2)
    labels = torch.from_numpy(held.labels)[numbers]
    losses = []
    for j in range(8):
        t = (j + 0.5) / 8
        e = philox.normal(0, 8 * numbers + j, philox.NOISE, 3 * 16 * 16).view_as(x).double()
        with torch.no_grad():
            v = loaded.model((t * x + (1 - t) * e).float(), torch.full((20,), t), labels)
        losses.append((v.double() - (x - e)).square().mean())
    return torch.stack(losses)


def test_the_loss_is_its_formula(run: Path) -> None:
    """At the end of the run, of the average and of the raw weights; the means over times are those of the rows."""
    last = validated(run)[-1]
    average, raw = by_formula(run, "ema_0.5"), by_formula(run, "raw")
    assert last["validation_loss"] == pytest.approx(average.mean().item(), rel=1e-5)
    assert last["validation_loss_raw"] == pytest.approx(raw.mean().item(), rel=1e-5)
    assert abs(average.mean() / raw.mean() - 1) > 1e-3, "the two must differ, or nothing is tested"
    for t, loss in zip(TIMES, average.tolist(), strict=True):
        assert last[f"validation_loss_t{t:g}"] == pytest.approx(loss, rel=1e-5)


def test_it_is_measured_when_it_is_due_and_at_the_end(run: Path) -> None:
    assert [row["nimg"] for row in validated(run)] == [32, 64, 80]
    assert [row["nimg"] for row in rows(run) if "loss" in row] == [16, 32, 48, 64, 80]
    assert (run / "loss.png").stat().st_size > 1000


def test_a_resumed_run_measures_the_same_bit_for_bit(run: Path, tmp_path: Path) -> None:
    for images in (48, 80):
        assert main(train(tmp_path / "run", images, *OWN, *HELD)) == 0
    assert [row for row in validated(tmp_path / "run") if row["nimg"] != 48] == validated(run)


def test_measuring_leaves_the_training_as_it_is(run: Path, tmp_path: Path) -> None:
    """With the same images held out but measured at the end only, every step has the same loss."""
    rare = [*OWN, *HELD, "data.validation.every_images=1000"]
    assert main(train(tmp_path / "run", 80, *rare)) == 0
    losses = [[row["loss"] for row in rows(folder) if "loss" in row] for folder in (run, tmp_path / "run")]
    assert losses[0] == losses[1] and validated(tmp_path / "run") == validated(run)[-1:]


def test_two_ranks_measure_what_one_does(tmp_path: Path) -> None:
    """The first row comes before any step has changed much: at a rate of 1e-9 the weights are those of the start."""
    for world in (1, 2):
        still = [*OWN, *HELD, "optimizer.lr=1e-9", "train.zero_stage=3"]
        ranks = start_ranks(train(tmp_path / str(world), 32, *still), world)
        said = [process.communicate(timeout=150)[0] for process in ranks]
        assert [process.returncode for process in ranks] == [0] * world, said
    one, two = (validated(tmp_path / str(world))[0] for world in (1, 2))
    assert one.keys() == two.keys() and one == pytest.approx(two, rel=1e-6)


def test_a_resume_names_images_that_are_held_out_otherwise(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    shutil.copytree(run, tmp_path / "run")
    assert main(train(tmp_path / "run", 96, *OWN, *HELD, "data.validation.share=0.2")) == 0
    said = capsys.readouterr().out
    assert "data.validation.share has changed: 0.1 -> 0.2" in said
    assert "the data have changed: 1,6" in said and "image numbers mean other images than before" in said
    assert "the images that are held out (data.validation) have changed; the validation loss is of other" in said


def test_another_root_holds_what_is_held_out(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """All images are trained on, and the other root's are measured; a root of other classes is refused."""
    config = cfg.load(Path(__file__).parents[2] / "configs" / "digits.yaml", (), model_schema)
    whole, _ = open_data(config.data)
    other = tmp_path / "other"
    for i in range(0, len(whole), 100):
        (other / whole.classes[whole.label(i)]).mkdir(parents=True, exist_ok=True)
        shutil.copy(whole.path(i), other / whole.classes[whole.label(i)])
    command = [*OWN, f"data.validation.root={other}"]
    assert main(train(tmp_path / "run", 32, *command)) == 0
    assert "1,797 images" in capsys.readouterr().out and len(validated(tmp_path / "run")) == 1
    shutil.rmtree(other / "9")
    assert main(train(tmp_path / "new", 32, *command)) == 2
    assert "has 9 classes and data.root 10; in one of the two only: 9" in capsys.readouterr().err
    assert main(train(tmp_path / "new", 32, *OWN, f"data.validation.root={tmp_path / 'none'}")) == 2
    assert f"data.validation.root {tmp_path / 'none'}: " in capsys.readouterr().err


def test_a_sequential_system_has_its_own_loss(tmp_path: Path) -> None:
    """Its value is a function of the weights, and there are no times to name."""
    config = str(Path(__file__).parents[2] / "configs" / "patch_ar_digits.yaml")
    command = ["train", config, *HELD, "model.hidden_size=32", "model.num_heads=2", "train.global_batch=16"]
    command += ["train.micro_batch=8", "data.validation.every_images=16", "optimizer.warmup_images=0"]
    command += ["sample.grid_every_images=0", "log.tensorboard=false", "sample.steps=1", "save.every_images=16"]
    for name, images in (("whole", 32), ("broken", 16), ("broken", 32)):
        assert main([*command, f"run.dir={tmp_path / name}", f"train.images={images}"]) == 0
    found = validated(tmp_path / "whole")
    assert found == validated(tmp_path / "broken") and len(found) == 2
    assert found[0].keys() == {"nimg", "validation_loss", "validation_loss_raw"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["share=0.1", "root=x"], "data.validation.share is 0.1 and data.validation.root x; leave out one"),
        (["images=8"], "data.validation.images is given, but nothing is held out"),
        (["share=1.0"], "data.validation.share is 1.0; it lies in [0, 1)"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture, changes: list[str], said: str
) -> None:
    changed = (f"data.validation.{change}" for change in changes)
    assert main(train(tmp_path / "run", 16, "optimizer.warmup_images=0", *changed)) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_a_decoder_has_no_use_for_it(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    config = str(Path(__file__).parents[2] / "configs" / "decoder_digits.yaml")
    assert main(["decoder", config, f"run.dir={tmp_path / 'run'}", "data.validation.share=0.1"]) == 2
    assert "data.validation is of generators" in capsys.readouterr().err
