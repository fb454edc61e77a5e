"""Which tuning configuration of an operator's kernels a plan takes.

An operator lists a few, the one for an H100 first. tuned/<gpu>.json names a better one for some sizes on one GPU, found
by measuring them all there (benchmarks/gpu_day.py, part "tuning"), small enough to be reviewed:

    {"norm_modulate": {"1152": [2, 8, 32]}}          operator -> sizes that it is tuned by -> configuration
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).resolve().parent / "tuned"

_forced: dict[str, Any] = {}
_asked: list[tuple[str, tuple[int, ...]]] | None = None
_planned: str | None = None  # the GPU that is planned for, where that is not the one of this process


def chosen(operator: str, configs: tuple[Any, ...], *sizes: int) -> Any:
    """The configuration for the GPU of this process: a forced one, the tuned one for these sizes, or the first."""
    if _asked is not None:
        _asked.append((operator, sizes))
    if _forced and operator in _forced:
        return _forced[operator]
    return _tuned(operator, configs, sizes, _gpu() if _planned is None else _planned)


@contextmanager
def asked() -> Iterator[list[tuple[str, tuple[int, ...]]]]:
    """Write down (operator, sizes) of every choice inside: what an entry of a tuned table goes by."""
    global _asked
    before, _asked = _asked, []
    try:
        yield _asked
    finally:
        _asked = before


@contextmanager
def planning_for(gpu: str) -> Iterator[None]:
    """Inside, plans take the configurations of the GPU of this name, whichever is there."""
    global _planned
    before, _planned = _planned, gpu
    try:
        yield
    finally:
        _planned = before


@contextmanager
def using(operator: str, config: Any) -> Iterator[None]:
    """Inside, this operator takes this configuration."""
    before = dict(_forced)
    _forced[operator] = config
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)


def table_of(gpu: str) -> dict[str, dict[str, list[Any]]]:
    """The tuned configurations for a GPU by its name ("NVIDIA H100 80GB HBM3" takes h100.json); empty without a file.

    Raises ValueError for a file that is no such table.
    """
    for path in sorted(FOLDER.glob("*.json")):
        if path.stem.lower() in gpu.lower().replace("-", " ").split():
            content = json.loads(path.read_text())
            if not all(isinstance(sizes, dict) for sizes in content.values()):
                raise ValueError(f"{path}: must map operators to sizes to configurations")
            return content
    return {}


@functools.cache
def _gpu() -> str:
    """The name of this process's GPU, empty without one."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else ""


@functools.cache
def _tuned(operator: str, configs: tuple[Any, ...], sizes: tuple[int, ...], gpu: str) -> Any:
    found = table_of(gpu).get(operator, {}).get(",".join(map(str, sizes)))
    if found is None:
        return configs[0]
    for config in configs:
        if list(config) == found:
            return config
    raise ValueError(
        f"{FOLDER}: {operator} for {sizes} on {gpu} names {found}, which is none of its "
        f"configurations {[list(config) for config in configs]}; measure again, or remove the entry"
    )
