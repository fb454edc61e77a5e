"""The copy of the weights that a model is built on and does not train, in the folder of a run or an export.

A run whose model is built on a DINO, a tokenizer or an autoencoder keeps what it began from, so that it draws, resumes
and exports again when the file or the hub that it came from is gone. models/built_on.py says what there is to keep.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from safetensors import SafetensorError

from pixelgen_fast import config as cfg
from pixelgen_fast.data.cache import published_folder
from pixelgen_fast.errors import InputError


def keep(folder: Path, config: cfg.Config) -> None:
    """Copy what a model is built on into a folder, in place of older copies; nothing for other models.

    Raises ValueError when it cannot be read, and InputError when a copy cannot be written.
    """
    for part in config.model.built_on:
        if part.is_read_from(config.model, folder):
            continue
        kept = folder / part.name
        try:
            with published_folder(kept) as work:
                part.copy(config, work)
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"{kept}: a copy of the {part.name} cannot be written there ({error}); free some space or choose "
                "another folder"
            ) from error


def with_kept(config: cfg.Config, folder: Path) -> cfg.Config:
    """The configuration with the copies that `keep` left in a folder, where there are some."""
    return _reading(config, folder, [part.name for part in config.model.built_on if (folder / part.name).is_dir()])


def inside(config: cfg.Config) -> cfg.Config:
    """The configuration as an exported folder has it: what the model is built on, by its place in the folder."""
    return _reading(config, Path(), [part.name for part in config.model.built_on])


def _reading(config: cfg.Config, folder: Path, names: list[str]) -> cfg.Config:
    changes: dict[str, str] = {}
    for part in config.model.built_on:
        if part.name in names:
            changes |= part.places(config.model, folder)
    return replace(config, model=replace(config.model, **changes))
