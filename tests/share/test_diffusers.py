"""An export for diffusers draws the images of pixelgen sample, in a process where pixelgen_fast is not installed."""

import json
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from support.models import TINY, tiny

from pixelgen_fast import config as cfg
from pixelgen_fast.config import Sampling
from pixelgen_fast.diffusion.solver import SOLVERS
from pixelgen_fast.errors import InputError
from pixelgen_fast.models import model_schema
from pixelgen_fast.runs import draw
from pixelgen_fast.runs.draw import Generator
from pixelgen_fast.runs.export import GeneratorError
from pixelgen_fast.share.diffusers import CODE, COVERED, export_diffusers

CONFIGS = Path(__file__).parents[2] / "configs"
OPENER = Path(__file__).with_name("diffusers_opener.py")
# name: (system, its settings, other sections of the configuration, what the call to the pipeline changes)
CASES: dict[str, tuple[str, dict, dict, dict]] = {
    "as it comes": ("pixeldit", {}, {}, {}),
    "post-modulation": ("pixeldit", dict(post_modulation=True, gelu_tanh=True), {}, {"seed": 2**63 + 5, "first": 3}),
    "registers": ("pixeldit", dict(registers=3, pixel_mlp_ratio=2), {}, {"guidance_scale": 3.0}),
    "float32 stream": ("pixeldit", dict(pixel_stream_float32=True), {"objective": {"noise_scale": 0.5}}, {}),
    "predicts e": ("pixeldit", {}, {"objective": {"predict": "e"}}, {"solver": "euler", "end": 0.9}),
    "energy path": ("pixeldit", {}, {"objective": {"path": "energy_guided"}}, {"batch_size": 2}),
    "JiT": ("jit", {}, {"objective": {"predict": "x"}}, {}),
    "JiT without context": (
        "jit", dict(context_length=0), {"objective": {"predict": "x", "t_eps": 0.2}},
        {"solver": "heun", "interval": (0.1, 0.8), "shift": 2.0},
    ),
    "JiT, context at once": ("jit", dict(context_start=0, dropout=0.2), {"objective": {"predict": "x"}}, {}),
}  # fmt: skip
NAMES = {"num_inference_steps": "steps", "guidance_scale": "guidance", "batch_size": "batch"}
LABELS = ["a", "c", "b"]


def generator(system: str, model: dict[str, Any], sections: dict[str, Any]) -> Generator:
    """A tiny model at no special weights, drawn in few steps with guidance."""
    settings = TINY[system] | model
    values = {
        "model": {"system": system} | settings,
        "data": {"image_size": 16},
        "sample": {"steps": 3, "guidance": 1.5},
    }
    config = cfg.from_dict(values | sections, model_schema)
    return Generator(tiny(system, **model).eval(), config, ["a", "b", "c"], "ema", 7)


def images(g: Generator, changes: dict[str, Any]) -> torch.Tensor:
    """What pixelgen sample draws, before it is rounded to bytes."""
    settings = {f.name: getattr(g.config.sample, f.name) for f in fields(Sampling)}
    settings |= {NAMES.get(name, name): value for name, value in changes.items() if name != "first"}
    labels = torch.tensor([g.classes.index(label) for label in LABELS])
    first = changes.get("first", 0)
    return g._sample(torch.arange(first, first + len(labels)), labels, lambda: None, settings)


def test_the_same_images_without_this_package(tmp_path: Path) -> None:
    wanted, asked = {}, []
    for name, (system, model, sections, changes) in CASES.items():
        folder, g = str(tmp_path / name), generator(system, model, sections)
        limit = 5000 if name == "as it comes" else 10**9
        assert "trust_remote_code=True" in export_diffusers(Path(folder), g, limit)
        wanted[folder] = images(g, changes)
        asked.append((folder, LABELS, changes))
    assert len(list((tmp_path / "as it comes" / "transformer").glob("*.safetensors"))) > 1, "one case is in shards"
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, str(OPENER), json.dumps(asked), str(tmp_path / "found.pt")]
    done = subprocess.run(command, env=env | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    found = torch.load(tmp_path / "found.pt")
    for folder, image in wanted.items():
        assert image.abs().max() > 0.5, "noise alone would be no test"
        torch.testing.assert_close(
            found[folder], image, atol=1e-5, rtol=1e-5, msg=lambda text, at=folder: f"{at}: {text}"
        )


@pytest.mark.parametrize("system", COVERED)
def test_every_configuration_of_a_covered_system_has_the_form(system: str) -> None:
    from pixelgen_fast.share.diffusers import check_covered

    named = 0
    for file in sorted(CONFIGS.glob("*.yaml")):
        values = OmegaConf.load(file)
        if OmegaConf.select(values, "model.system") == system:
            check_covered(cfg.load(file, ["data.root=x"], model_schema))
            named += 1
    assert named


def test_the_solvers_are_the_same() -> None:
    """The two lists of names; that they do the same is compared above."""
    text = (CODE / "pipeline.py").read_text()
    listed = re.search(r"^SOLVERS = \{(.*)\}$", text, re.MULTILINE)[1]
    assert re.findall(r'"(\w+)":', listed) == list(SOLVERS)
    used = {changes.get("solver", "adams2") for *_, changes in CASES.values()}
    assert used == set(SOLVERS)


def test_what_has_no_form_is_refused_in_a_line(tmp_path: Path) -> None:
    guided = generator("pixeldit", {}, {"sample": {"guide": "weak", "guidance": 2.0}})
    moving = generator("pixeldit", {}, {"objective": {"path": "energy_guided", "predict": "x"}})
    deco = generator("deco", {}, {})
    for g, said in ((guided, "and no guide"), (moving, "with predict x"), (deco, "pixeldit and jit have")):
        with pytest.raises(InputError, match=said):
            export_diffusers(tmp_path / "out", g)
        assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    with pytest.raises(GeneratorError, match="is not empty"):
        export_diffusers(tmp_path / "out", generator("pixeldit", {}, {}))


def test_a_setting_that_the_code_does_not_know_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, settings = COVERED["pixeldit"]
    monkeypatch.setitem(COVERED, "pixeldit", (name, tuple(s for s in settings if s != "registers")))
    export_diffusers(tmp_path / "default", generator("pixeldit", {}, {}))
    with pytest.raises(InputError, match="model.registers is 2"):
        export_diffusers(tmp_path / "out", generator("pixeldit", {"registers": 2}, {}))


def test_it_is_no_folder_of_export(tmp_path: Path) -> None:
    export_diffusers(tmp_path / "out", generator("pixeldit", {}, {}))
    with pytest.raises(GeneratorError, match="is a form for diffusers"):
        draw.load(tmp_path / "out")
