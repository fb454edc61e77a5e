"""Files of weights as people have them, and files that would run code."""

import argparse
import collections
import os
import pathlib
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from pixelgen_fast.errors import InputError
from pixelgen_fast.weights import plain_names, read_file

STATE = {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.ones(2, dtype=torch.bfloat16)}


def same(found: dict[str, Tensor]) -> bool:
    return found.keys() == STATE.keys() and all(torch.equal(found[name], value) for name, value in STATE.items())


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors", "weights"])
@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
def test_a_file_is_told_by_what_it_holds(tmp_path: Path, form: str, name: str) -> None:
    if form == "safetensors":
        save_file(STATE, tmp_path / name)
    else:
        torch.save(STATE, tmp_path / name, _use_new_zipfile_serialization=form == "zip")
    assert same(read_file(tmp_path / name))


@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize(
    "beside",
    [
        np.float64(4.2),
        np.float32(4.2),
        np.int64(3),
        np.bool_(True),
        np.str_("best"),
        np.arange(3.0),
        argparse.Namespace(lr=1e-4, betas=(0.9, 0.99)),
        collections.OrderedDict(epoch=1),
        [1, 2.5, None, "text", {"a": (1,)}],
        torch.device("cpu"),
        torch.float16,
    ],
    ids=lambda value: type(value).__name__,
)
def test_plain_values_may_stand_beside_the_weights(tmp_path: Path, beside: object, new: bool) -> None:
    torch.save({"state_dict": STATE, "beside": beside}, tmp_path / "w.ckpt", _use_new_zipfile_serialization=new)
    assert same(read_file(tmp_path / "w.ckpt")["state_dict"])


def test_numbers_of_numpy_1_are_read(tmp_path: Path) -> None:
    torch.save({"state_dict": STATE, "fid": np.float64(4.2)}, tmp_path / "w.ckpt", _use_new_zipfile_serialization=False)
    content = (tmp_path / "w.ckpt").read_bytes()
    new, old = b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"
    assert new in content or old in content
    (tmp_path / "w.ckpt").write_bytes(content.replace(new, old))
    assert read_file(tmp_path / "w.ckpt")["fid"] == 4.2


class Calls:
    """Unpickled by anybody careless, it calls a function."""

    def __init__(self, function, *arguments) -> None:
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
@pytest.mark.parametrize("function", [os.system, pathlib.Path.touch, eval, np.load])
def test_nothing_in_a_file_is_run(tmp_path: Path, form: str, function) -> None:
    trace, file = tmp_path / "trace", tmp_path / "w.ckpt"
    arguments = {os.system: (f"touch {trace}",), pathlib.Path.touch: (trace,)}
    call = Calls(function, *arguments.get(function, (f"open({str(trace)!r}, 'w')",)))
    if form == "pickle":
        file.write_bytes(pickle.dumps({"a.weight": call}, 2))
    else:
        torch.save({"state_dict": STATE, "beside": call}, file, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(InputError, match="not a readable PyTorch checkpoint of plain tensors") as error:
        read_file(file)
    assert not trace.exists() and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"text",
        b"PK\x03\x04 no archive",
        struct.pack("<Q", 2) + b"{]",
        struct.pack("<Q", 90)
        + b'{"a":{"dtype":"F32","shape":[1000000000,1000000000],"data_offsets":[0,4]}}'
        + b" " * 99,
        pickle.dumps([1, 2], 2),
    ],
)
def test_what_holds_no_weights_is_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "w").write_bytes(content)
    with pytest.raises(InputError, match="not a readable file of weights") as error:
        read_file(tmp_path / "w")
    assert "\n" not in str(error.value)


def test_a_list_of_tensors_is_no_state_dict(tmp_path: Path) -> None:
    torch.save([torch.ones(1)], tmp_path / "w")
    with pytest.raises(InputError, match="holds a list instead of weights by name"):
        read_file(tmp_path / "w")
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_file(tmp_path / "none")


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("module.a.weight", "a.weight"),
        ("module.module.a.weight", "a.weight"),
        ("_orig_mod.module.a.weight", "a.weight"),
        ("blocks.0._orig_mod.attn._checkpoint_wrapped_module.a", "blocks.0.attn.a"),
        ("_fsdp_wrapped_module.a", "a"),
        ("a.module.weight", "a.module.weight"),
    ],
)
def test_names_lose_what_wrappers_put_there(name: str, plain: str) -> None:
    assert [*plain_names({name: torch.ones(1)}, "here")] == [plain]


def test_two_names_that_become_one_are_refused() -> None:
    with pytest.raises(InputError, match="here: holds a twice, the second time as module.a"):
        plain_names({"a": torch.ones(1), "module.a": torch.ones(1)}, "here")
