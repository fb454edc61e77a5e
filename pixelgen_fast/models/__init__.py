"""The generators: one module for each system, named as its `model.system`; system.py says what a system is."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

import torch

from pixelgen_fast import config as cfg
from pixelgen_fast.errors import InputError
from pixelgen_fast.models.system import BaseSystem, Settings


def systems() -> list[str]:
    """Names of the available systems, for `model.system`."""
    return sorted(_systems())


def system_module(name: str) -> ModuleType:
    """The module of a system. Raises InputError with the valid names for an unknown one."""
    known = _systems()
    if name not in known:
        raise InputError(f"model.system: unknown system {name!r}; valid: {', '.join(sorted(known))}")
    return known[name]


def model_schema(name: str) -> type[Settings]:
    """The settings dataclass of a system, for config.load."""
    return system_module(name).Settings


def build_model(config: cfg.Config, num_classes: int) -> BaseSystem:
    """A fresh model, its weights a function of run.seed alone. Raises ConfigError for settings that it would ignore."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        model = system_module(config.model.system).build(config.model, config.data.image_size, num_classes)
    model.check_settings(config.objective, config.sample)
    return model


def _systems() -> dict[str, ModuleType]:
    modules = {name: importlib.import_module(f"{__name__}.{name}") for _, name, _ in pkgutil.iter_modules(__path__)}
    return {name: module for name, module in modules.items() if hasattr(module, "build")}
