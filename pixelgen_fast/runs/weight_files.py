"""Weights in a folder, as safetensors: one file, or several beside an index, as Hugging Face's libraries have them.

<name>.safetensors                             where all fit into one file, else
<name>-00001-of-0000N.safetensors, ...         tensors in their order, each file up to a limit
<name>.safetensors.index.json                  {"metadata": {"total_size": bytes}, "weight_map": {tensor: file}}
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pixelgen_fast.errors import InputError
from pixelgen_fast.runs.folder import WEIGHTS
from pixelgen_fast.runs.plain import check_types, read_object

SUFFIX = ".safetensors"
SHARD_BYTES = 5 * 10**9
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def size_of(text: str) -> int:
    """Bytes of a size such as 5GB, 200MB or 1000000. Raises InputError for another text, and for none at all."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]B)?", text.strip().upper())
    size = int(float(found[1]) * _UNITS[found[2] or ""]) if found else 0
    if size < 1:
        raise InputError(f"--shard-size {text}: is no size of a file; write 5GB, 200MB or a number of bytes")
    return size


def save_weights(state: Mapping[str, Tensor], file: Path, limit: int = SHARD_BYTES) -> list[Path]:
    """Write CPU tensors as `file`, NAME.safetensors, or as several beside it where they are more than `limit` bytes.

    A tensor is never divided: one above the limit is a file by itself. Returns the files that were written.
    """
    shards: list[dict[str, Tensor]] = [{}]
    room = limit
    for name, value in state.items():
        if shards[-1] and value.nbytes > room:
            shards.append({})
            room = limit
        shards[-1][name] = value.contiguous()
        room -= value.nbytes
    if len(shards) == 1:
        save_file(shards[0], file, metadata={"format": "pt"})
        return [file]
    names = [f"{file.stem}-{i:05d}-of-{len(shards):05d}{SUFFIX}" for i in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        save_file(shard, file.with_name(name), metadata={"format": "pt"})
    places = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
    index = {"metadata": {"total_size": sum(value.nbytes for value in state.values())}, "weight_map": places}
    _index(file).write_text(json.dumps(index, indent=2) + "\n")
    return [*(file.with_name(name) for name in names), _index(file)]


def load_weights(file: Path) -> dict[str, Tensor]:
    """The tensors that `save_weights` wrote as `file`, or another program in the same form.

    Raises OSError for a file that is not there, ValueError for one that is damaged, for an index that names another
    folder, and for a tensor that is not in the file that the index names.
    """
    if not _index(file).is_file():
        return _load(file)
    index = read_object(_index(file))
    check_types(index, {"weight_map": dict})
    places = index["weight_map"]
    for name in places.values():
        if not isinstance(name, str) or "/" in name or "\0" in name or not name.endswith(SUFFIX):
            raise ValueError(f"{_index(file).name} names {name!r}, which is no file of weights beside it")
    shards = {name: _load(file.with_name(name)) for name in sorted(set(places.values()))}
    state = {key: shards[name].pop(key) for key, name in places.items() if key in shards[name]}
    if missing := [f"{key} in {name}" for key, name in places.items() if key not in state]:
        raise ValueError(f"{_index(file).name} names {len(missing)} tensors that are not there: {missing[0]}")
    if extra := [f"{key} in {name}" for name, shard in shards.items() for key in shard]:
        raise ValueError(f"{_index(file).name} does not name {len(extra)} tensors that are there: {extra[0]}")
    return state


def model_files(folder: Path) -> str:
    """What the weights of an exported folder are called, for a reader."""
    count = len(list(folder.glob(f"{Path(WEIGHTS).stem}*{SUFFIX}")))
    return WEIGHTS if count == 1 else f"{count} files {Path(WEIGHTS).stem}-...{SUFFIX}"


def _load(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file.name}: {error}") from error


def _index(file: Path) -> Path:
    return file.with_name(f"{file.name}.index.json")
