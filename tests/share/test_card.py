"""The card says what the run left, in the form that the hub reads, and the licences of all that is in the folder."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from huggingface_hub import ModelCard
from support.models import TINY
from support.runs import exported, newest, train

from pixelgen_fast import config as cfg
from pixelgen_fast import interop
from pixelgen_fast.cli import main
from pixelgen_fast.errors import InputError
from pixelgen_fast.interop.licences import PUBLISHED, of_network, of_published
from pixelgen_fast.models import model_schema
from pixelgen_fast.runs import draw
from pixelgen_fast.share.card import card, contained, evaluation, front_matter, strictest

SMALL = ("optimizer.warmup_images=0", *(f"model.{name}={value}" for name, value in TINY["pixeldit"].items()))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that began from what was published of PixelDiT, and was judged."""
    folder = tmp_path_factory.mktemp("runs")
    begun = exported(folder / "imported", published=["pixeldit"])
    assert main(train(folder / "run", 32, f"run.init={begun}", *SMALL)) == 0
    assert main(["evaluate", str(folder / "run"), "--samples", "20", "--steps", "1"]) == 0
    return folder / "run"


def written(run: Path, out: Path, *options: str) -> str:
    assert main(["push", str(run), "me/digits", "--out", str(out), *options]) == 0
    return (out / "README.md").read_text()


def test_the_card_is_of_the_run(run: Path, tmp_path: Path) -> None:
    text = written(run, tmp_path / "out")
    assert {"README.md", "final.png", "loss.png", "model.safetensors", "config.json"} == {
        path.name for path in (tmp_path / "out").iterdir()
    }
    for name in re.findall(r"!\[[^]]*\]\(([^)]+)\)", text):
        assert (tmp_path / "out" / name).read_bytes() == (run / name).read_bytes()
    report = json.loads((run / "evaluation.json").read_text())["report"]
    assert f"{report['share']:.1%} of 20 generated digits show the requested class" in text
    assert "drawn with steps 1, solver adams2" in text
    assert "weights ema_0.999, nimg 32" in text
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert f"image 32, loss {last['loss']:.4g}" in text
    assert "pixelgen sample hub:me/digits --classes 0 --out images" in text
    settings = yaml.safe_load(re.search(r"```yaml\n(.*?)```", text, re.DOTALL)[1])
    assert settings["model"]["hidden_size"] == TINY["pixeldit"]["hidden_size"]
    assert str(run.parent) not in text, "places of a machine are nobody's business"


def test_the_hub_reads_what_stands_in_front(run: Path, tmp_path: Path) -> None:
    """By the hub's own library."""
    data = ModelCard(written(run, tmp_path / "out")).data
    assert (data.license, data.license_name) == ("other", "nvidia-source-code-license-(nsclv1)")
    assert data.library_name == "pixelgen_fast"
    assert data.pipeline_tag == "unconditional-image-generation"
    assert {"pixeldit", "class-conditional"} <= set(data.tags)


def test_numbers_of_other_weights_are_left_out(run: Path, tmp_path: Path) -> None:
    assert "## Numbers" not in written(run, tmp_path / "raw", "--weights", "raw")
    loaded = draw.load(run)
    assert evaluation(loaded, tmp_path)[1] == []
    (tmp_path / "evaluation.json").write_text('{"settings": {"weights": "ema_0.999", "nimg": 32}, "report": {"x": 1}}')
    assert evaluation(loaded, tmp_path)[1] == []


def test_the_licence_of_published_weights_goes_on(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """From the export that a run began from through its checkpoints, another run's, and its own export, to the card."""
    assert main(train(run.parent / "resumed", 64, f"run.resume={run}", "run.init=null", *SMALL)) == 0
    capsys.readouterr()
    assert main(["export", str(run.parent / "resumed"), str(tmp_path / "export")]) == 0
    assert "NSCLv1" in capsys.readouterr().out
    assert json.loads((tmp_path / "export" / "config.json").read_text())["published"] == ["pixeldit"]
    assert json.loads((newest(run.parent / "resumed") / "state.json").read_text())["published"] == ["pixeldit"]
    assert "These weights began from them and keep it." in written(tmp_path / "export", tmp_path / "out")
    assert main(["push", str(run), "me/digits", "--license", "mit", "--out", str(tmp_path / "no")]) == 2
    assert "whose licence stays: NVIDIA" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_an_older_export_of_published_weights_is_known_by_its_data(tmp_path: Path) -> None:
    folder = exported(tmp_path / "old")
    about = json.loads((folder / "config.json").read_text())
    del about["published"]
    (folder / "config.json").write_text(json.dumps(about))
    assert draw.load(folder).published == []
    about["config"]["data"]["root"] = "imported"
    (folder / "config.json").write_text(json.dumps(about))
    assert draw.load(folder).published == ["pixeldit"]


def test_own_weights_have_the_licence_that_is_given(tmp_path: Path) -> None:
    folder = exported(tmp_path / "own")
    assert "Its owner has not said" in written(folder, tmp_path / "none")
    text = written(folder, tmp_path / "given", "--license", "apache-2.0")
    assert "The weights: `apache-2.0`." in text
    assert ModelCard(text).data.license == "apache-2.0"
    assert "![" not in text, "an export has no pictures"


def test_every_published_form_has_a_licence() -> None:
    assert set(PUBLISHED) == set(interop.SYSTEMS)
    with pytest.raises(InputError, match="'other': their licence is not known here"):
        of_published("other")


def test_networks_of_others_in_the_folder_are_named() -> None:
    def holding(system: str, **settings: str | None) -> SimpleNamespace:
        config = SimpleNamespace(model=model_schema(system)(**settings))
        return SimpleNamespace(config=config, published=[], classes=["a"])

    student = holding("dino_student", dino="vit_small_patch16_dinov3.lvd1689m")
    assert [found.name for found in contained(student)] == ["DINOv3 License"]
    assert front_matter(student, None)["license_name"] == "dinov3-license"
    encoder = "vit_base_patch14_reg4_dinov2.lvd142m"
    assert contained(holding("ditdh", encoder=encoder))[0].id == "apache-2.0"
    assert contained(holding("ditdh", encoder=None)) == contained(holding("pixeldit")) == []
    assert contained(holding("alitok", tokenizer="t"))[0].id is None
    assert front_matter(holding("alitok", tokenizer="t"), None)["license"] == "unknown"
    assert of_network("resnet50") is None and of_network(None) is None
    assert strictest([of_published("jit"), of_published("raev2"), of_published("deco")]).id is None
    assert strictest([]) is None


def test_a_run_with_validation_has_its_last_loss_its_optimizer_and_no_place_of_a_machine(tmp_path: Path) -> None:
    held = str(tmp_path / "private")
    config = cfg.from_dict(
        {
            "model": {"system": "pixeldit"},
            "data": {"root": "digits", "validation": {"root": held}},
            "optimizer": {"name": "muon"},
        },
        model_schema,
    )
    (tmp_path / "metrics.jsonl").write_text(
        '{"nimg": 64, "loss": 0.25, "step": 1}\n{"nimg": 64, "validation_loss": 0.5}\n'
    )
    model = SimpleNamespace(parameters=lambda: [], used_sampling=())
    generator = SimpleNamespace(config=config, classes=["0", "1"], nimg=64, weights="raw", published=[], model=model)
    text = card(generator, tmp_path, "me/digits", None, (), "")
    assert "image 64, loss 0.25" in text and "| optimizer | muon, learning rate" in text
    assert "root: private" in text and str(tmp_path) not in text
