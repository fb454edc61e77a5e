"""Exported folders of others: wrong types, numbers beyond reason and foreign weights are one line each."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pixelgen_fast import config as cfg
from pixelgen_fast import models
from pixelgen_fast.errors import UserError
from pixelgen_fast.runs import draw
from pixelgen_fast.runs.export import export

MODEL = {"system": "pixeldit", "hidden_size": 32, "num_heads": 2, "patch_depth": 1, "patch_size": 4}
MODEL |= {"pixel_hidden_size": 4, "pixel_depth": 1}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "out"
    config = cfg.from_dict({"model": MODEL, "data": {"image_size": 8}}, models.model_schema)
    export(folder, models.build_model(config, 2).state_dict(), config, ["a", "b"], "ema_0.9999", 7)
    return folder


@pytest.fixture
def changed(exported: Path) -> Callable[[Callable[[dict], object]], Path]:
    """changed(harm): the folder with another config.json; put back afterwards."""
    file = exported / "config.json"
    whole = file.read_text()

    def change(harm: Callable[[dict], object]) -> Path:
        about = json.loads(whole)
        replaced = harm(about)
        file.write_text(json.dumps(about if replaced is None else replaced))
        return exported

    yield change
    file.write_text(whole)


def put(*path: str, value: object) -> Callable[[dict], None]:
    def harm(about: dict) -> None:
        for key in path[:-1]:
            about = about[key]
        about[path[-1]] = value

    harm.__name__ = f"{'.'.join(path)}={value}"[:60]
    return harm


def without(key: str) -> Callable[[dict], None]:
    def harm(about: dict) -> None:
        del about[key]

    return harm


CASES = [
    (lambda about: [1], "config.json holds a list ([1]) instead of an object"),
    (without("config"), "config is missing"),
    (without("classes"), "classes is missing"),
    (without("nimg"), "nimg is missing"),
    (without("format"), "format None"),
    (put("classes", value=None), "classes is null (null), where a list of texts belongs"),
    (put("classes", value={"x": 1}), "classes is an object"),
    (put("classes", value=["a", 1]), "where a list of texts belongs"),
    (put("classes", value=[]), "classes is empty"),
    (put("classes", value=["a"]), "y_embed.weight is [3, 32], wanted [2, 32]"),
    (put("classes", value=["a", "../b"]), "cannot name a folder"),
    (put("nimg", value=-1), "nimg is a whole number (-1), where a whole number from 0 on belongs"),
    (put("weights", value=["ema"]), "weights is a list"),
    (put("config", value=None), "config is null"),
    (put("config", "model", value=[1]), "model.system: "),
    (put("config", "model", value="pixeldit"), "model.system is missing"),
    (put("config", "model", "system", value={"a": 1}), "unknown system"),
    (put("config", "model", "num_heads", value=0), "model.num_heads is 0"),
    (put("config", "model", "patch_size", value=0), "model.patch_size is 0"),
    (put("config", "model", "patch_size", value=3), "does not divide"),
    (put("config", "model", "patch_depth", value="${"), "model.patch_depth"),
    (put("config", "model", "patch_depth", value="${x}"), "Interpolation key 'x' not found"),
    (put("config", "model", "patch_depth", value=1.5), "model.patch_depth"),
    (put("config", "model", "patch_depth", value=10**9), "it must be at most 1,000"),
    (put("config", "model", "hidden_size", value=10**30), "it must be at most 65,536"),
    (put("config", "model", "hidden_size", value=65_536), "weights do not fit"),
    (put("config", "data", "image_size", value=10**9), "it must be at most 16,384"),
    (put("config", "data", "image_size", value=16_384), "needs tables of"),
    (put("config", "data", value=7), "int is not a subclass of Data"),
    (put("config", "optimizer", "ema", value=["x"]), "optimizer.ema"),
    (put("config", "sample", "interval", value=[1]), "length 1"),
    (put("config", "run", "seed", value=2**70), "run.seed is 1180591620717411303424"),
]


@pytest.mark.parametrize(("harm", "reason"), CASES, ids=[reason[:40] for _, reason in CASES])
def test_a_config_that_does_not_fit_is_one_line(changed, harm: Callable[[dict], object], reason: str) -> None:
    with pytest.raises(UserError, match=re.escape(reason)) as error:
        draw.load(changed(harm))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, '"text"', "\udcff", "{}"])
def test_a_config_that_is_no_json_object_is_one_line(changed, exported: Path, text: str) -> None:
    changed(lambda about: None)
    (exported / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match="not a readable export"):
        draw.load(exported)


def test_what_is_left_alone_loads(changed) -> None:
    assert draw.load(changed(lambda about: None)).nimg == 7


def test_numbers_that_are_no_weights_are_refused(exported: Path) -> None:
    file = exported / "model.safetensors"
    state, whole = load_file(file), file.read_bytes()
    try:
        save_file({name: value.to(torch.int8) for name, value in state.items()}, file)
        with pytest.raises(UserError, match="holds torch.int8 instead of weights"):
            draw.load(exported)
        file.write_bytes(whole[:-8])
        with pytest.raises(UserError, match="not a readable export"):
            draw.load(exported)
    finally:
        file.write_bytes(whole)
