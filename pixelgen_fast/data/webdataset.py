"""The class of an image of a WebDataset tar: what lies beside it under the same key, up to the first dot of its name.

    000017.jpg   000017.cls      a class number or name, as text
    000017.jpg   000017.json     an object with one of the keys label, cls, class, class_id

A .cls file counts wherever the image lies, a .json only for an image in no folder, whose name tells no class.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from tarfile import TarInfo

from pixelgen_fast.errors import InputError

_KEYS = ("label", "cls", "class", "class_id")
# Class numbers up to here are believed; a larger one is no class.
_MOST_CLASSES = 1_000_000


def label_file(members: dict[str, TarInfo], image: str) -> str | None:
    """The member that names the class of a member; None where there is none."""
    folder, _, base = image.rpartition("/")
    key = (f"{folder}/" if folder else "") + base.partition(".")[0]
    kinds = (".cls",) if folder else (".cls", ".json")
    return next((key + kind for kind in kinds if key + kind in members), None)


def read_class(file: int, shard: Path, member: TarInfo) -> str:
    """The class that a label file of an open shard names. Raises InputError, naming it, for one that names none."""
    text = os.pread(file, member.size, member.offset_data).decode("utf-8", "replace").strip()
    value: object = text
    if member.name.endswith(".json"):
        try:
            fields = json.loads(text)
        except ValueError as error:
            raise InputError(f"{shard}: member {member.name} is no JSON: {error}") from error
        value = next((fields[key] for key in _KEYS if key in fields), None) if isinstance(fields, dict) else None
    if isinstance(value, bool) or not isinstance(value, (int, str)) or value == "":
        raise InputError(f"{shard}: member {member.name} names no class: {text[:60]!r}")
    return str(value)


def class_names(of_image: list[str]) -> list[str]:
    """All classes in label order: numbers count from 0, whichever of them occur; names are sorted.

    Raises InputError for numbers beyond reason.
    """
    found = set(of_image)
    if not all(name.isascii() and name.isdigit() and name == str(int(name)) for name in found):
        return sorted(found)
    most = max(map(int, found))
    if most >= _MOST_CLASSES:
        raise InputError(f"class number {most:,} is beyond {_MOST_CLASSES:,}: class files must hold numbers from 0 on")
    return [str(k) for k in range(most + 1)]
