"""Systems rebuilt from a file of reference numbers: one module for each family, found by the file's config["system"].

A module has SYSTEMS, a mapping of that name to a function of a `GoldenFile` that computes every array and number of the
file again and yields (name, found, wanted). Weights come by the file's formula, inputs from the file: nothing else is
read, so that a file which was never seen is rebuilt as well.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from support.golden import relative, weight
from torch import Tensor

Comparison = tuple[str, Tensor | float, Tensor | float]
Rebuild = Callable[["GoldenFile"], Iterator[Comparison]]

LIMIT = 1e-5
# a gradient's norm below this share of the largest one is no number but rounding
ROUNDING = 1e-7


class GoldenFile:
    """What a file holds. arrays: {name: tensor}. config. keys: {name in a state dict: shape}, in order. grad_norms."""

    def __init__(self, path: Path) -> None:
        self.path = path
        content = np.load(path)
        texts = {name: json.loads(str(content[name])) for name in content.files if content[name].dtype.kind == "U"}
        self.config: dict[str, Any] = texts["config"]
        self.keys: dict[str, list[int]] = texts.get("keys", {})
        self.grad_norms: dict[str, float] = texts.get("grad_norms", {})
        self.texts = texts
        self.arrays = {name: torch.from_numpy(content[name]) for name in content.files if name not in texts}

    def __getitem__(self, name: str) -> Tensor:
        return self.arrays[name]

    def state(self, prefix: str = "", keys: str = "keys") -> dict[str, Tensor]:
        """The weights by formula, of the names in the text `keys`; prefix: put before a name in the formula."""
        return {name: weight(prefix + name, shape) for name, shape in self.texts[keys].items()}

    def gradients(self, parameters: Mapping[str, Tensor]) -> Iterator[Comparison]:
        """The norm of every gradient that the file has, after a backward pass; parameters by the file's names.

        What the maths makes zero, as of a bias before a softmax or a norm takes it away, is rounding in the file: it is
        compared with zero.
        """
        rounding = ROUNDING * max(self.grad_norms.values(), default=0.0)
        for name, norm in self.grad_norms.items():
            grad = parameters[name].grad
            found = 0.0 if grad is None else grad.double().norm().item()
            yield f"grad_norms[{name}]", found, norm if norm > rounding else 0.0


def systems() -> dict[str, Rebuild]:
    """The function of each system that can be rebuilt."""
    modules = (importlib.import_module(f"{__name__}.{name}") for _, name, _ in pkgutil.iter_modules(__path__))
    return {name: function for module in modules for name, function in module.SYSTEMS.items()}


def errors(path: Path) -> dict[str, float]:
    """The relative error of every array and number of a file, by name. Raises ValueError for an unknown system."""
    file, known = GoldenFile(path), systems()
    system = file.config.get("system")
    if system not in known:
        raise ValueError(f"{path}: system {system!r} cannot be rebuilt; known: {', '.join(sorted(known))}")
    return {name: error(found, wanted) for name, found, wanted in known[system](file)}


def error(found: Tensor | float, wanted: Tensor | float) -> float:
    """||found - wanted|| / ||wanted|| in float64; the plain difference where wanted is zero; infinite for a NaN or
    another shape."""
    found, wanted = (torch.as_tensor(value).detach().double() for value in (found, wanted))
    if found.shape != wanted.shape or not bool(torch.isfinite(found).all()):
        return float("inf")
    return relative(found, wanted) if bool(wanted.any()) else float(found.norm())
