"""Weights in several files: the form is Hugging Face's, what comes back is what was written, damage is a ValueError."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from pixelgen_fast.errors import InputError
from pixelgen_fast.runs.weight_files import load_weights, model_files, save_weights, size_of

STATE = {f"block{i}.weight": torch.full((5, 5), float(i)) for i in range(5)} | {"big": torch.ones(100)}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file of weights that became four: two tensors of 100 bytes each into 250, and one of 400 by itself."""
    save_weights(STATE, tmp_path / "model.safetensors", limit=250)
    return tmp_path / "model.safetensors"


def change_index(file: Path, **places: object) -> None:
    index = file.with_name("model.safetensors.index.json")
    values = json.loads(index.read_text())
    values["weight_map"] |= places
    index.write_text(json.dumps(values))


def test_the_files_hold_up_to_the_limit_and_the_index_says_where(file: Path, tmp_path: Path) -> None:
    shards = {path.name: set(load_file(path)) for path in tmp_path.glob("*.safetensors")}
    pairs = [{"block0.weight", "block1.weight"}, {"block2.weight", "block3.weight"}, {"block4.weight"}, {"big"}]
    names = [f"model-{i:05d}-of-00004.safetensors" for i in range(1, 5)]
    assert shards == dict(zip(names, pairs, strict=True))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    places = {key: name for name, keys in shards.items() for key in keys}
    assert index == {"metadata": {"total_size": 900}, "weight_map": places}
    assert model_files(tmp_path) == "4 files model-....safetensors"


def test_the_library_of_hugging_face_reads_them(file: Path, tmp_path: Path) -> None:
    from huggingface_hub import load_torch_model

    model = nn.Module()
    for name in STATE:
        place = model
        if "." in name:
            place = nn.Module()
            model.add_module(name.split(".")[0], place)
        place.register_parameter(name.split(".")[-1], nn.Parameter(torch.zeros_like(STATE[name])))
    load_torch_model(model, tmp_path, strict=True)
    assert all(torch.equal(value, STATE[name]) for name, value in model.state_dict().items())


def test_what_comes_back_is_what_was_written(file: Path, tmp_path: Path) -> None:
    found = load_weights(file)
    assert list(found) == list(STATE)
    assert all(torch.equal(found[name], value) for name, value in STATE.items())
    assert save_weights(STATE, tmp_path / "one.safetensors") == [tmp_path / "one.safetensors"]
    assert load_weights(tmp_path / "one.safetensors").keys() == STATE.keys()


@pytest.mark.parametrize("place", ["../other.safetensors", "/etc/passwd", "model.bin", 5, None, "a\0.safetensors"])
def test_an_index_that_names_another_place_is_refused(file: Path, place: object) -> None:
    change_index(file, big=place)
    with pytest.raises(ValueError, match="which is no file of weights beside it"):
        load_weights(file)


def test_what_does_not_fit_its_index_is_named(file: Path, tmp_path: Path) -> None:
    change_index(file, other="model-00001-of-00004.safetensors")
    with pytest.raises(ValueError, match="1 tensors that are not there: other in model-00001-of-00004.safetensors"):
        load_weights(file)
    save_weights(STATE, file, limit=250)
    save_file({"big": torch.ones(100), "more": torch.ones(1)}, tmp_path / "model-00004-of-00004.safetensors")
    with pytest.raises(ValueError, match="does not name 1 tensors that are there: more"):
        load_weights(file)
    (tmp_path / "model-00002-of-00004.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="model-00002-of-00004.safetensors: "):
        load_weights(file)
    (tmp_path / "model-00002-of-00004.safetensors").unlink()
    with pytest.raises(OSError, match="model-00002"):
        load_weights(file)


def test_sizes() -> None:
    assert [size_of(text) for text in ("5GB", "1.5 MB", "200kb", "7")] == [5 * 10**9, 1_500_000, 200_000, 7]
    for text in ("", "GB", "-1", "0", "0.2", "5GiB", "five"):
        with pytest.raises(InputError, match="--shard-size"):
            size_of(text)
