"""The copy of a DINO that stays with what is built on it: in the folder of a run, and in an export.

A run whose model is built on a DINO keeps what it began from, so that it draws, resumes and exports again when the file
or the hub that it came from is gone.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from safetensors import SafetensorError

from pixelgen_fast import config as cfg
from pixelgen_fast.data.cache import published_folder
from pixelgen_fast.dino.network import copy_dino
from pixelgen_fast.errors import InputError

DINO = "dino"  # in the folder of a run or an export


def keep_dino(folder: Path, config: cfg.Config) -> None:
    """Copy the DINO that a model is built on into a folder, in place of an older one; nothing for other models.

    Raises ValueError when model.weights cannot be read, and InputError when the copy cannot be written.
    """
    kept = folder / DINO
    if not config.model.builds_on_dino or config.model.weights == str(kept):
        return
    try:
        with published_folder(kept) as work:
            copy_dino(config.model.dino, config.model.weights, work)
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{kept}: a copy of model.dino cannot be written there ({error}); free some space or choose another folder"
        ) from error


def with_kept_dino(config: cfg.Config, folder: Path) -> cfg.Config:
    """The configuration with model.weights the copy that `keep_dino` left in a folder, where there is one."""
    return reading(config, str(folder / DINO)) if (folder / DINO).is_dir() else config


def reading(config: cfg.Config, weights: str) -> cfg.Config:
    """The configuration with other weights of the DINO that its model is built on; the same where it has none."""
    return replace(config, model=replace(config.model, weights=weights)) if config.model.builds_on_dino else config
