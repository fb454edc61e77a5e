"""Weights of others that a model is built on: which settings name them, and how to copy them (runs/kept.py)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pixelgen_fast.config import Config
from pixelgen_fast.dino.network import copy_dino


class BuiltOn(NamedTuple):
    """name: of the folder that holds a copy. copy(config, folder): write it there.

    settings: those of the section `model` that say where the parts are, each with its place in that folder, "" the
    folder itself; the first is always read, another one where it is not null. used(model): whether the settings of a
    model name it at all. network: the setting that holds timm's name of it, if one does. published: the system of
    interop/ with whose weights it was published, if it was.
    """

    name: str
    settings: Mapping[str, str]
    copy: Callable[[Config, Path], None]
    used: Callable[[Any], bool] = lambda model: True
    network: str | None = None
    published: str | None = None

    def places(self, model: Any, folder: Path) -> dict[str, str]:
        """The settings with which a model reads the copy in a folder; none where it names none."""
        if not self.used(model):
            return {}
        first, *others = self.settings
        named = [first, *(setting for setting in others if getattr(model, setting) is not None)]
        return {setting: str(folder / self.name / self.settings[setting]) for setting in named}

    def network_of(self, model: Any) -> str | None:
        """timm's name of the network that a model is built on here; None where it has no such name, or none is used."""
        return getattr(model, self.network) if self.network is not None and self.used(model) else None

    def is_read_from(self, model: Any, folder: Path) -> bool:
        """Whether a model reads nothing of it but the copy in a folder."""
        return all(getattr(model, setting) == place for setting, place in self.places(model, folder).items())


def _copy_dino(config: Config, folder: Path) -> None:
    copy_dino(config.model.dino, config.model.weights, folder)


DINO = BuiltOn("dino", {"weights": ""}, _copy_dino, network="dino")
