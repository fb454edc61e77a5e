"""Weights of others that a model is built on: which settings name them, and how to copy them (runs/kept.py)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from pixelgen_fast.config import Config
from pixelgen_fast.dino.network import copy_dino


class BuiltOn(NamedTuple):
    """name: of the folder that holds a copy. setting: of the section `model`, which says where they are, and can say
    that folder. copy(config, folder): write them there."""

    name: str
    setting: str
    copy: Callable[[Config, Path], None]

    def source(self, config: Config) -> str | None:
        """Where a configuration says that they are."""
        return getattr(config.model, self.setting)


def _copy_dino(config: Config, folder: Path) -> None:
    copy_dino(config.model.dino, config.model.weights, folder)


DINO = BuiltOn("dino", "weights", _copy_dino)
