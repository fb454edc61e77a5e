"""JSON files that others may have written or damaged: an object with the types that are expected, or one line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

LARGEST_BYTES = 2**26
_NAMES = {dict: "an object", list: "a list", str: "a text", int: "a whole number", float: "a number"}
_NAMES |= {bool: "true or false", type(None): "null"}


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object of a file. Raises OSError where it cannot be read, ValueError where it holds something else."""
    if (size := path.stat().st_size) > LARGEST_BYTES:
        raise ValueError(f"{path.name} has {size:,} bytes, which is no file of settings")
    try:
        values = json.loads(path.read_bytes())
    except RecursionError as error:
        raise ValueError(f"{path.name} is nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"{path.name} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path.name} holds {_name(values)} instead of an object")
    return values


def check_types(values: Mapping[str, Any], kinds: Mapping[str, type]) -> None:
    """Raise ValueError, naming the key, for one that is missing or has another type than wanted.

    kinds: int takes whole numbers from 0 to 2^63 - 1; float takes every finite number; list takes texts alone.
    """
    for key, kind in kinds.items():
        if key not in values:
            raise ValueError(f"{key} is missing")
        value = values[key]
        if not _is(value, kind):
            wanted = {list: "a list of texts", int: "a whole number from 0 on"}.get(kind, _NAMES[kind])
            raise ValueError(f"{key} is {_name(value)}, where {wanted} belongs")


def _is(value: Any, kind: type) -> bool:
    if isinstance(value, bool):
        return kind is bool
    if kind is float:
        return isinstance(value, int | float) and abs(value) < float("inf")
    if kind is int:
        return isinstance(value, int) and 0 <= value < 2**63
    return isinstance(value, kind) and (kind is not list or all(isinstance(part, str) for part in value))


def _name(value: Any) -> str:
    """A value in a message: itself where it is short."""
    return f"{_NAMES.get(type(value), 'something')} ({json.dumps(value)[:40]})"
