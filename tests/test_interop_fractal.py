"""FractalGen's published weights: complete names in both directions, sizes from shapes, files, and the import."""

import json
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from rebuilt import GoldenFile

from pixelgen_fast import interop
from pixelgen_fast.cli import main
from pixelgen_fast.interop import fractal as published
from pixelgen_fast.models.fractal import Level, Settings, build
from pixelgen_fast.runs import draw

GOLDEN = Path(__file__).parent / "golden"
FORM = published.FORM


def lists(sides: list[int], widths: list[int], blocks: list[int], heads: list[int], kind: str) -> dict:
    return dict(img_size_list=sides, embed_dim_list=widths, num_blocks_list=blocks, num_heads_list=heads,
                generator_type_list=[kind] * (len(sides) - 1) + ["ar"], num_conds=5 if kind == "mar" else 1,
                guiding_pixel=sides[0] == 256)  # fmt: skip


PUBLISHED = [
    lists([64, 4, 1], [1024, 512, 128], [32, 8, 3], [16, 8, 4], "ar"),
    lists([64, 4, 1], [1024, 512, 128], [32, 8, 3], [16, 8, 4], "mar"),
    lists([256, 16, 4, 1], [768, 384, 192, 64], [24, 6, 3, 1], [12, 6, 3, 4], "mar"),
    lists([256, 16, 4, 1], [1024, 512, 256, 64], [32, 8, 4, 1], [16, 8, 4, 4], "mar"),
    lists([256, 16, 4, 1], [1280, 640, 320, 64], [40, 10, 5, 1], [16, 8, 4, 4], "mar"),
]
SMALL = dict(
    hidden_size=16, num_heads=2, depth=1, patch_size=4, inner=[Level(1, 8, 1, 2)], pixel_hidden_size=12,
    pixel_num_heads=4, pixel_depth=2, guiding_pixel=False,
)  # fmt: skip
KINDS = {
    "masked": SMALL,
    "guiding pixel": SMALL | dict(guiding_pixel=True),
    "causal": SMALL | dict(generator="causal"),
}


@pytest.fixture
def known_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """The widths of SMALL are among those whose heads are known."""
    monkeypatch.setitem(published.HEADS, (16, 8, 12), (2, 1, 4))
    for kind in ("masked", "causal"):
        monkeypatch.setitem(published.SAMPLING, (kind, (16, 8, 12)), (3.0, 1.1))


@pytest.mark.parametrize("config", PUBLISHED, ids=["AR 64", "MAR 64", "MAR B", "MAR L", "MAR H"])
def test_the_size_of_a_published_model_is_read_from_its_shapes(config: dict) -> None:
    settings, size, classes = FORM.config(config | dict(r_weight=5.0))
    assert (size, classes) == (config["img_size_list"][0], 1000)
    with torch.device("meta"):
        state = {name: torch.empty(shape) for name, shape in FORM.public_shapes(settings, size, classes).items()}
        model = build(settings, size, classes)
    found, read, count = interop.native("fractal", state)
    assert read == settings and count == 1000 and interop.image_size("fractal", state) == size
    assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in model.state_dict().items()}
    assert interop.settings("fractal", read, size)["sample"]["passes"] == 64


@pytest.mark.parametrize("name", ["fractalmar", "fractalar"])
def test_the_names_are_those_of_the_public_state_dict_in_its_order(name: str) -> None:
    file = GoldenFile(GOLDEN / f"{name}.npz")
    shapes = FORM.public_shapes(*FORM.config(file.config))
    assert [(key, list(shape)) for key, shape in shapes.items()] == [(key, shape) for key, shape in file.keys.items()]


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back(kind: str, known_heads: None) -> None:
    settings = Settings(**KINDS[kind])
    model = build(settings, 16, 7)
    public = FORM.to_public(model.state_dict(), settings)
    native, read, classes = interop.native("fractal", public)
    assert (read, classes) == (settings, 7)
    assert native.keys() == model.state_dict().keys()
    assert all(torch.equal(native[name], value) for name, value in model.state_dict().items())
    assert torch.equal(public["fake_latent"][0], model.y_embed.weight[-1])


def test_missing_extra_and_misshapen_weights_are_named(known_heads: None) -> None:
    settings = Settings(**KINDS["masked"])
    public = FORM.to_public(build(settings, 16, 7).state_dict(), settings)
    without = {name: value for name, value in public.items() if name != "generator.norm.bias"}
    for state, message in [
        (without, r"missing generator.norm.bias \[16\]"),
        (public | {"generator.norm.scale": torch.zeros(2)}, r"extra generator.norm.scale \[2\]"),
        (public | {"fake_latent": torch.zeros(1, 15)}, r"fake_latent is \[1, 15\], wanted \[1, 16\]"),
        ({name: value for name, value in public.items() if "fake" not in name}, "not a FractalGen state dict"),
        (public | {"next_fractal.next_fractal.r_codebook.weight": torch.zeros(256, 9)}, "number of heads is known for"),
    ]:
        with pytest.raises(ValueError, match=message):
            interop.native("fractal", state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(generator_type_list=["mar", "ar", "ar"]), "one kind is known"),
        (dict(num_conds=1), "one kind is known"),
        (dict(hidden=3), "unknown hidden"),
    ],
)
def test_a_configuration_that_no_published_model_has_is_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FORM.config(PUBLISHED[1] | change)


def test_a_published_file_is_imported_and_draws(
    tmp_path: Path, known_heads: None, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    settings = Settings(**KINDS["masked"])
    model = build(settings, 8, 3).eval()
    file, out = tmp_path / "checkpoint-last.pth", tmp_path / "out"
    content = {"model": FORM.to_public(model.state_dict(), settings), "optimizer": {"state": {}}, "epoch": 3,
               "scaler": {}, "args": Namespace(lr=1e-4)}  # fmt: skip
    torch.save(content, file)
    assert main(["import", str(file), str(out), "--system", "fractal"]) == 0, capsys.readouterr().err
    loaded = draw.load(out)
    assert all(torch.equal(loaded.model.state_dict()[name], value) for name, value in model.state_dict().items())
    assert json.loads((out / "config.json").read_text())["config"]["sample"]["guidance"] == 3.0
    images = loaded.draw(torch.tensor([1]), passes=2)
    assert images.shape == (1, 8, 8, 3) and np.ptp(images.numpy()) > 0
    torch.save({"optimizer": {}}, file)
    assert main(["import", str(file), str(tmp_path / "other"), "--system", "fractal"]) == 2
    assert "has a dictionary 'model', this file has none" in capsys.readouterr().err
