"""The manifest of a checkpoint: size and CRC-32 of each of its files, and of itself.

    manifest.json      {"format": 1, "files": {name: {"bytes": n, "crc32": c}}, "crc32": of those two entries}

Its text is a function of what it says, so that a flipped bit in a name, a number or a space makes it another text than
it claims to be. CRC-32 (zlib, some 3 GB/s a core) finds truncation and flipped bits, not tampering.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

from pixelgen_fast.atomic import sync
from pixelgen_fast.runs.plain import check_types, read_object

FORMAT = 1
MANIFEST = "manifest.json"
Files = dict[str, dict[str, int]]


def seal(file: Path) -> dict[str, int]:
    """Bring a file to disk and describe it for the manifest."""
    sync(file)
    return {"bytes": file.stat().st_size, "crc32": checksum(file)}


def write_manifest(folder: Path, files: Files) -> None:
    """Write the manifest of a folder and bring both to disk."""
    (folder / MANIFEST).write_text(_text(files))
    sync(folder / MANIFEST)
    sync(folder)


def read_manifest(folder: Path) -> Files:
    """The files of a checkpoint. Raises ValueError for a manifest that is damaged, OSError for one not readable."""
    values = read_object(folder / MANIFEST)
    check_types(values, {"format": int, "files": dict})
    files = values["files"]
    for name, entry in files.items():
        if name in ("", ".", "..", MANIFEST) or "/" in name or "\0" in name:
            raise ValueError(f"files has {name!r}, which is no file of a checkpoint")
        if not isinstance(entry, dict):
            raise ValueError(f"files has no description of {name}")
        check_types(entry, {"bytes": int, "crc32": int})
    # the first checkpoints of this format had no checksum of the manifest
    if values.keys() != {"format", "files"} and (folder / MANIFEST).read_text() != _text(files):
        raise ValueError("its own checksum is another than when it was written")
    return files


def damage(folder: Path, rank: int = 0, world: int = 1) -> list[str]:
    """What is wrong with a checkpoint, by its manifest; empty if nothing. Ranks of a world share the files out."""
    try:
        files = sorted(read_manifest(folder).items())
    except (OSError, ValueError) as error:
        return [f"{MANIFEST} cannot be read ({error})"]
    return [problem for name, entry in files[rank::world] if (problem := _damage(folder / name, entry))]


def _damage(file: Path, entry: dict[str, int]) -> str:
    """What is wrong with a file by its entry in the manifest. What cannot be read is damaged, not the end of a run."""
    name = file.name
    try:
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != entry["bytes"]:
            return f"{name} has {file.stat().st_size} bytes instead of {entry['bytes']}"
        if checksum(file) != entry["crc32"]:
            return f"{name} has another checksum than when it was written"
    except OSError as error:
        return f"{name} cannot be checked ({error!r})"
    return ""


def _text(files: Any) -> str:
    covered = {"format": FORMAT, "files": files}
    return json.dumps(covered | {"crc32": zlib.crc32(json.dumps(covered).encode())}, indent=1)


def checksum(file: Path) -> int:
    """CRC-32 of a file."""
    found = 0
    with file.open("rb") as stream:
        while block := stream.read(2**22):
            found = zlib.crc32(block, found)
    return found
