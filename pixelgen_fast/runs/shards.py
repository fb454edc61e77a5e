"""The tensors of a checkpoint: safetensors files whose keys are `<kind>/<name>`.

    uint64 n | n bytes of JSON {key: {dtype, shape, data_offsets}} | the bytes of all tensors, one after another

They are written here and not by the library, which holds the interpreter's lock meanwhile: a checkpoint is written
beside the training. Reading is the library's; it holds every shape and offset to the size of the file.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pixelgen_fast.errors import UserError
from pixelgen_fast.runs.manifest import Files, read_manifest

MASTER, BUFFER = "master", "buffer"
SUFFIX = ".safetensors"
_DTYPES = {
    torch.float32: "F32", torch.float64: "F64", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


class CheckpointError(UserError, RuntimeError):
    """A checkpoint could not be written, found or read; nothing that was on disk before has changed."""


def write_shard(file: Path, tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Write CPU tensors and bring them to disk; returns the manifest's entry. Raises OSError."""
    header: dict[str, Any] = {}
    end = 0
    for key, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        header[key] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    size, crc = 0, 0
    with file.open("wb") as stream:
        for block in _blocks(struct.pack("<Q", len(text)) + text, tensors.values()):
            stream.write(block)
            size, crc = size + len(block), zlib.crc32(block, crc)
        stream.flush()
        os.fsync(stream.fileno())
    return {"bytes": size, "crc32": crc}


def _blocks(head: bytes, tensors: Iterable[Tensor]) -> Iterator[Any]:
    yield head
    for tensor in tensors:
        yield memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())


def write_shards(folder: Path, rank: int, shards: Iterable[Mapping[str, Tensor]]) -> tuple[Files, str | None]:
    """Write a rank's shards: ({file: manifest entry}, error). All of them are taken, also behind an error."""
    written: Files = {}
    error: str | None = None
    for number, tensors in enumerate(shards):
        name = f"rank{rank:05d}-{number:03d}{SUFFIX}"
        try:
            if error is None and tensors:
                written[name] = write_shard(folder / name, tensors)
        except OSError as failure:
            error = f"rank {rank} could not write {name}: {failure}"
    return written, error


def open_shards(path: Path, stack: ExitStack) -> dict[tuple[str, str], Any]:
    """{(kind, name): open file that has it} of a checkpoint. No tensor is read yet.

    Raises CheckpointError for a file that is not safetensors or whose header does not fit its size, for a key that is
    there twice, and for state of a parameter that is not float32.
    """
    index: dict[tuple[str, str], Any] = {}
    try:
        for file in sorted(name for name in read_manifest(path) if name.endswith(SUFFIX)):
            opened = stack.enter_context(safe_open(path / file, framework="pt"))
            for key in opened.keys():  # noqa: SIM118  (a safetensors file is not a dict)
                kind, _, name = key.partition("/")
                if not name or (kind, name) in index:
                    raise ValueError(
                        f"{file} has {key!r}, " + ("which is there twice" if name else "which is no state")
                    )
                if kind != BUFFER and (dtype := opened.get_slice(key).get_dtype()) != "F32":
                    raise ValueError(f"{key} in {file} is {dtype} instead of F32")
                index[kind, name] = opened
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"checkpoint {path} cannot be used: {error}") from error
    return index


def shape_of(file: Any, kind: str, name: str) -> tuple[int, ...]:
    """The shape of a tensor in an open file."""
    return tuple(file.get_slice(f"{kind}/{name}").get_shape())


def read_weights(path: Path | str, kind: str) -> dict[str, Tensor]:
    """Full fp32 CPU weights and buffers of a checkpoint, without an engine.

    kind: "raw" (what was trained), or "ema_<decay>" of an average that was kept. A parameter that
    was trained but not averaged is given raw. Raises CheckpointError if the checkpoint has no such average.
    """
    path = Path(path)
    with ExitStack() as stack:
        index = open_shards(path, stack)
        averages = sorted({k for k, _ in index if k.startswith("ema_")}, key=lambda k: (len(k), k))
        if kind != "raw" and kind not in averages:
            raise CheckpointError(f"checkpoint {path} has no weights {kind!r}; it has {['raw', *averages]}")
        chosen: dict[str, str] = {}
        for wanted in (MASTER, kind, BUFFER):
            chosen |= {name: k for k, name in index if k == wanted}
        return {name: index[k, name].get_tensor(f"{k}/{name}") for name, k in chosen.items()}
