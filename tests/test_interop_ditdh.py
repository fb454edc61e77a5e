"""Published weights of DiT-DH and RAEv2: both forms of a file, both directions, and what the sampler is told."""

from pathlib import Path

import pytest
import rebuilt
import torch
from rebuilt.ditdh import rotary_tables
from support.golden import FOLDER, relative
from support.models import TINY, tiny
from torch import Tensor, nn

from pixelgen_fast import config as cfg
from pixelgen_fast import interop
from pixelgen_fast.cli import main
from pixelgen_fast.models import model_schema, system_module
from pixelgen_fast.runs import draw

SYSTEMS = {"ditdh": "rae_ditdh", "raev2": "raev2_ditdh"}


@pytest.fixture(params=SYSTEMS)
def system(request: pytest.FixtureRequest) -> str:
    return request.param


def published(system: str) -> tuple[rebuilt.GoldenFile, dict[str, Tensor]]:
    """The reference numbers of a system and the state dict that they are of."""
    file = rebuilt.GoldenFile(FOLDER / f"{SYSTEMS[system]}.npz")
    return file, file.state() | rotary_tables(file)


def public_answer(system: str, model: nn.Module, file: rebuilt.GoldenFile) -> Tensor:
    """What the public network answers, by ours: there t = 0 is data, and a velocity points to noise."""
    answer = model(file["x"], 1 - file["t"], file["y"])
    return -answer if system == "ditdh" else answer


@pytest.mark.parametrize("form", ["bare", "training", "wrapped"])
def test_import_of_either_form_and_export_in_the_public_one(system: str, form: str, tmp_path: Path) -> None:
    """What is imported answers as the reference numbers say, and comes out as it came in, name by name."""
    file, state = published(system)
    raw = {name: value + 1 for name, value in state.items()}
    content = {"bare": state, "training": {"step": 3, "epoch": 1, "model": raw, "ema": state, "optimizer": {}}}
    content["wrapped"] = {"ema": {f"module.{name}": value for name, value in state.items()}}
    torch.save(content[form], tmp_path / "stage2_model.pt")
    out, back = tmp_path / "imported", tmp_path / "back.pt"
    assert main(["import", str(tmp_path / "stage2_model.pt"), str(out), "--system", system]) == 0
    loaded = draw.load(out)
    assert relative(public_answer(system, loaded.model, file), file["output"]) < 1e-5
    assert loaded.config.data.image_size == 64 and len(loaded.classes) == 10

    command = ["export", str(out), str(back), "--format", "public"]
    assert main(command) == 0 and main(command) == 2
    again = torch.load(back, weights_only=True)
    assert again.keys() == state.keys()
    for name, value in state.items():
        torch.testing.assert_close(
            again[name], value, rtol=0, atol=1e-6 if "freqs" in name or name == "pos_embed" else 0
        )


def test_a_strict_load_takes_exactly_the_public_names(system: str) -> None:
    file, state = published(system)
    config = {k: v for k, v in file.config.items() if k not in ("fixed", "convention")}
    module = interop.from_reference(system, config, state)
    assert module.state_dict().keys() == state.keys()
    module.load_state_dict(state, strict=True)
    assert {name for name, _ in module.named_parameters()} == file.grad_norms.keys()
    for name in state:
        with pytest.raises(ValueError, match=f"missing {name}"):
            interop.from_reference(system, config, {k: v for k, v in state.items() if k != name})


def test_a_model_of_ours_goes_out_and_comes_back(system: str) -> None:
    """Also with encoder and head of one width, which have no layer between them."""
    sizes = dict(patch_size=16, latent_channels=768) | (dict(base_depth=3) if system == "raev2" else {})
    for changes in (sizes, sizes | dict(head_width=24, head_depth=2)):
        model = tiny(system, image_size=64, **changes)
        settings = system_module(system).Settings(**(TINY[system] | changes | dict(encoder=None)))
        state = interop.to_public(system, model.state_dict(), settings, 64)
        assert ("s_projector.weight" in state) == (settings.head_width != 24)
        weights, found, classes = interop.native(system, state)
        assert classes == 3 and found == settings and interop.image_size(system, state) == 64
        assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())


def test_what_the_sampler_is_told() -> None:
    """RAE: 49 Euler steps that end at s(0.001) of noise; RAEv2: 100 to the end, led away from the weaker prediction."""
    ditdh, raev2 = (system_module(name).Settings() for name in SYSTEMS)
    rae = interop.settings("ditdh", ditdh, 256)
    assert rae["sample"] | {"shift": 0} == {"steps": 49, "solver": "euler", "end": 0.999, "shift": 0}
    assert rae["objective"]["time_min"] == 0.001
    for size, shift in ((256, 6.928203230275509), (512, 13.856406460551018)):
        sections = interop.settings("ditdh", ditdh, size)
        assert sections["sample"]["shift"] == sections["objective"]["time_shift"] == pytest.approx(shift)
    two = interop.settings("raev2", raev2, 256)
    assert two["objective"] == {"predict": "x", "time_shift": 8.0}
    assert two["sample"]["guidance"] == 1.78 and two["sample"]["shift"] == 8.0 and "end" not in two["sample"]


@pytest.mark.parametrize("name", ["ditdh_s", "ditdh_b", "ditdh_l", "ditdh_xl", "raev2_xl"])
def test_a_shipped_configuration_trains_and_draws_as_published_weights_do(name: str) -> None:
    config = cfg.load(Path(__file__).parents[1] / "configs" / f"{name}_256.yaml", [], model_schema)
    sections = interop.settings(config.model.system, config.model, config.data.image_size)
    for section in ("objective", "sample"):
        for key, value in sections[section].items():
            found = vars(getattr(config, section))[key]
            assert (list(found) if isinstance(found, tuple) else found) == value, key


def test_what_is_wrong_is_named(system: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file, state = published(system)
    config = {k: v for k, v in file.config.items() if k not in ("fixed", "convention")}
    with pytest.raises(ValueError, match="depth is 3; give one for the encoder and one for the head"):
        interop.from_reference(system, config | {"depth": 3}, state)
    torch.save({"epoch": 3}, tmp_path / "file.pt")
    command = ["import", str(tmp_path / "file.pt"), str(tmp_path / "out"), "--system", system]
    assert main(command) == 2
    assert "a training checkpoint has 'ema' or 'model', this file has neither" in capsys.readouterr().err
    torch.save(state, tmp_path / "file.pt")
    assert main([*command, "--image-size", "256"]) == 2
    assert "was made for 64 pixels" in capsys.readouterr().err
    assert main(command) == 0 and main(["sample", str(tmp_path / "out"), "--per-class", "1"]) == 2
    assert "model.encoder is null" in capsys.readouterr().err


def test_only_what_the_public_code_would_understand_is_written_for_it(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    _, state = published("ditdh")
    torch.save(state, tmp_path / "file.pt")
    assert main(["import", str(tmp_path / "file.pt"), str(tmp_path / "out"), "--system", "ditdh"]) == 0
    about = tmp_path / "out" / "config.json"
    about.write_text(about.read_text().replace('"predict": "v"', '"predict": "x"'))
    assert main(["export", str(tmp_path / "out"), str(tmp_path / "back.pt"), "--format", "public"]) == 2
    assert "objective.predict is x, and a published ditdh predicts v" in capsys.readouterr().err
    with pytest.raises(ValueError, match="the public layout of 'jit' is only read"):
        interop.to_public("jit", {}, None, 256)
