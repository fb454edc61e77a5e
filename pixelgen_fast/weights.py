"""Weights in files of others: read without running code of theirs, and whether they fit a network.

Files are told apart by what they hold, not by their names: safetensors, torch's zip format, torch's format of before
version 1.6. From the two of torch nothing is made but tensors, plain values and what ALLOWED names.
"""

from __future__ import annotations

import argparse
import re
import struct
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from pixelgen_fast.errors import InputError

_SCALAR, _ARRAY = (value.__reduce__()[0] for value in (np.float64(0), np.zeros(0)))
# bare containers of values: the command line that training scripts save beside weights, and NumPy's numbers and arrays
# under the names that they have in NumPy 1 and 2
ALLOWED: list[Any] = [
    argparse.Namespace,
    np.ndarray,
    np.dtype,
    *((_SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    *((_ARRAY, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
    *{type(np.dtype(code)) for code in "?bhilqBHILQefdSU"},
]
# what torch.compile, FSDP and activation checkpointing put into a name, and DataParallel in front of it
_INSIDE = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
_IN_FRONT = "module."


def read_file(path: Path) -> dict[Any, Any]:
    """What a file of weights holds: tensors by name, perhaps in sections and beside other values, on the CPU.

    Raises FileNotFoundError, or InputError for what cannot be read without running code.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with path.open("rb") as file, torch.serialization.safe_globals(ALLOWED):
            head = file.read(9)
            if head[8:] == b"{" and struct.unpack("<Q", head[:8])[0] < path.stat().st_size:
                return load_file(path)
            file.seek(0)
            # by this name torch expects safetensors; mmap keeps a file of several gigabytes out of memory
            misnamed = path.suffix == ".safetensors"
            options = {"map_location": "cpu", "weights_only": True}
            options["mmap"] = not misnamed and head[:4] == b"PK\x03\x04"
            content = torch.load(file if misnamed else path, **options)
    except SafetensorError as error:
        raise InputError(f"{path}: not a readable file of weights: {error}") from error
    except Exception as error:  # torch raises whatever the bytes lead it to
        reason = " ".join(str(error).split("\n\t")[0].split())[:300]
        raise InputError(
            f"{path}: not a readable file of weights: not a readable PyTorch checkpoint of plain tensors ({reason}); "
            "save its state dict alone, with torch.save or as safetensors"
        ) from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds a {type(content).__name__} instead of weights by name; save a state dict")
    return content


def plain_names(state: Mapping[str, Tensor], origin: str) -> dict[str, Tensor]:
    """Weights without what wrappers of their module have put into the names. Raises InputError where two become one."""
    renamed: dict[str, Tensor] = {}
    for name, value in state.items():
        plain = name
        for part in _INSIDE:
            plain = plain.replace(part, "")
        while plain.startswith(_IN_FRONT):
            plain = plain.removeprefix(_IN_FRONT)
        if plain in renamed:
            raise InputError(f"{origin}: holds {plain} twice, the second time as {name}")
        renamed[plain] = value
    return renamed


def rename(name: str, names: Iterable[tuple[str, str]]) -> str:
    """Apply (pattern, replacement) pairs to a parameter's name, in their order."""
    for pattern, replacement in names:
        name = re.sub(pattern, replacement, name)
    return name


def misfits(
    state: Mapping[str, Tensor], wanted: Mapping[str, Tensor | tuple[int, ...]], optional: Collection[str] = ()
) -> list[str]:
    """A line for each weight that is missing, extra or of another shape; empty where all fit.

    wanted: tensors or their shapes, by name. optional: names among them that may be absent.
    """
    shapes = {name: list(value.shape if isinstance(value, Tensor) else value) for name, value in wanted.items()}
    wrong = [f"missing {name} {s}" for name, s in shapes.items() if name not in state and name not in optional]
    wrong += [f"extra {name} {list(value.shape)}" for name, value in state.items() if name not in shapes]
    wrong += [
        f"{name} is {list(state[name].shape)}, wanted {s}"
        for name, s in shapes.items()
        if name in state and list(state[name].shape) != s
    ]
    return wrong
