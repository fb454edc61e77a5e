"""Guidance by a second model, and by a system's own weaker prediction: what is drawn, and what is refused."""

from pathlib import Path

import pytest
import torch
from support.models import TINY, tiny
from torch import Tensor

from pixelgen_fast import config as cfg
from pixelgen_fast import models
from pixelgen_fast.cli import main
from pixelgen_fast.diffusion.solver import sample, to_uint8
from pixelgen_fast.runs import draw
from pixelgen_fast.runs.export import export

STEPS = dict(steps=3, solver="euler", shift=2.0, end=0.9)


def exported(folder: Path, system: str, classes: int = 3, scale: float = 1.0, **objective: object) -> Path:
    """An export of a tiny model whose weights are those of `tiny`, scaled."""
    sections = {"model": {"system": system, **TINY[system]}, "data": {"image_size": 16}, "objective": objective}
    config = cfg.from_dict(sections, models.model_schema)
    model = tiny(system)
    state = {name: scale * value for name, value in model.state_dict().items()}
    if classes != 3:
        state[model.class_table] = torch.zeros(classes + 1, state[model.class_table].shape[1])
    export(folder, state, config, [str(i) for i in range(classes)], "ema", 0)
    return folder


def drawn_by(pair: object, folder: Path, guidance: float) -> Tensor:
    """What the sampler draws with a pair of predictions of the exported model."""
    model, numbers = draw.load(folder).model, torch.arange(3)
    x = sample(model, numbers, numbers, seed=0, shape=model.sample_shape, guidance=guidance, pair=pair, **STEPS)
    return to_uint8(model.decode(x))


def test_a_second_model_guides_with_the_same_label(tmp_path: Path) -> None:
    """Also one of another system, which predicts x where the model predicts v."""
    strong = exported(tmp_path / "strong", "pixeldit")
    weak = exported(tmp_path / "weak", "jit", predict="x", t_eps=0.2)
    model, guide, asked = draw.load(strong).model, draw.load(weak).model, []

    def pair(z: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        asked.append(y.tolist())
        return (guide(z, t, y) - z) / (1 - t[:, None, None, None]).clamp(min=0.2), model(z, t, y)

    expected = drawn_by(pair, strong, 1.5)
    generator = draw.load(strong)
    images = generator.draw(torch.arange(3), guidance=1.5, guide=str(weak), **STEPS)
    assert torch.equal(images, expected) and asked == [[0, 1, 2]] * 3
    assert not torch.equal(images, generator.draw(torch.arange(3), guidance=1.5, **STEPS))
    unguided = generator.draw(torch.arange(3), guidance=1.0, guide="nowhere", **STEPS)
    assert torch.equal(unguided, generator.draw(torch.arange(3), guidance=1.0, **STEPS))


def test_a_model_guides_itself_by_its_weaker_prediction(tmp_path: Path) -> None:
    folder = exported(tmp_path / "model", "raev2")
    model = draw.load(folder).model
    expected = drawn_by(lambda z, t, y: model(z, t, y, both=True)[::-1], folder, 1.78)
    passes = []
    options = dict(guidance=1.78, before_pass=lambda: passes.append(1), **STEPS)
    assert torch.equal(draw.load(folder).draw(torch.arange(3), **options), expected) and len(passes) == 3


def test_a_guide_that_does_not_fit_is_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    strong = exported(tmp_path / "strong", "pixeldit")
    latents, other = exported(tmp_path / "latents", "ditdh"), exported(tmp_path / "other", "jit", classes=5)
    louder = exported(tmp_path / "louder", "jit", noise_scale=2.0)
    generator = draw.load(strong)
    for guide, message in (
        (latents, r"samples \[48, 4, 4\] instead of \[3, 16, 16\]"),
        (other, "number of classes 5 instead of 3"),
        (louder, "objective.noise_scale 2.0 instead of 1.0"),
        (tmp_path / "nowhere", "no such folder"),
    ):
        with pytest.raises(ValueError, match=message):
            generator.draw(torch.arange(3), guidance=2.0, guide=str(guide), **STEPS)
    command = ["sample", str(strong), "--guide", str(other), "--guidance", "2", "--per-class", "1"]
    assert main([*command, "--out", str(tmp_path / "out")]) == 2
    assert f"sample.guide {other} does not go with this model" in capsys.readouterr().err


def test_a_guide_goes_the_same_path(tmp_path: Path) -> None:
    guided = dict(path="energy_guided", sigma0=2.0)
    strong, weak = exported(tmp_path / "strong", "pixeldit", **guided), exported(tmp_path / "weak", "deco", **guided)
    draw.load(strong).draw(torch.arange(3), guidance=2.0, guide=str(weak), **STEPS)
    linear = exported(tmp_path / "linear", "pixeldit")
    longer = exported(tmp_path / "longer", "deco", path="energy_guided")
    of_x = exported(tmp_path / "of_x", "jit", predict="x", **guided)
    for model, guide, message in (
        (strong, linear, "objective.path linear instead of energy_guided"),
        (linear, strong, "objective.path energy_guided instead of linear"),
        (strong, longer, "objective.sigma0 3.5 instead of 2.0"),
        (strong, of_x, "objective.predict x instead of v"),
    ):
        with pytest.raises(ValueError, match=message):
            draw.load(model).draw(torch.arange(3), guidance=2.0, guide=str(guide), **STEPS)


def test_a_run_refuses_a_guide_before_it_starts(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    digits = Path(__file__).parents[2] / "configs" / "digits.yaml"
    guide = exported(tmp_path / "guide", "pixeldit")
    assert main(["train", str(digits), f"run.dir={tmp_path / 'run'}", f"sample.guide={guide}"]) == 2
    assert "does not go with this model" in capsys.readouterr().err and not (tmp_path / "run").exists()
