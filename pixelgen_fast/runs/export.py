"""The folder that holds a trained model for others to load: one tensor a parameter in safetensors, and config.json.

config.json has the format, the configuration, the class names and which weights they are. Where the model is built on a
DINO, a tokenizer or an autoencoder, the folder holds that too, and needs neither the files nor the hub where it was.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pixelgen_fast import config as cfg
from pixelgen_fast.errors import InputError
from pixelgen_fast.runs.folder import ABOUT, WEIGHTS
from pixelgen_fast.runs.kept import inside, keep
from pixelgen_fast.runs.plain import check_types, read_object

FORMAT = "pixelgen_fast generator 1"


class GeneratorError(InputError):
    """A folder does not hold a generator; the message says what is missing and where one is expected."""


def export(
    folder: Path, state: dict[str, Tensor], config: cfg.Config, classes: list[str], weights: str, nimg: int
) -> None:
    """Write an exported folder. Raises GeneratorError when the folder holds something already, or cannot hold all."""
    if folder.exists() and any(folder.iterdir()):
        raise GeneratorError(f"{folder}: exists and is not empty; choose another folder or remove it")
    folder.mkdir(parents=True, exist_ok=True)
    keep(folder, config)
    settings = cfg.to_dict(inside(config))
    about = {"format": FORMAT, "weights": weights, "nimg": nimg, "classes": classes, "config": settings}
    save_file({name: value.contiguous() for name, value in state.items()}, folder / WEIGHTS)
    (folder / ABOUT).write_text(json.dumps(about, indent=2) + "\n")


def read_exported(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(weights, config.json) of an exported folder.

    Raises GeneratorError when either is missing or damaged, has other types, or is of another format.
    """
    try:
        about = read_object(folder / ABOUT)
        if about.get("format") != FORMAT:
            raise ValueError(f"format {about.get('format')!r}, this version reads {FORMAT!r}")
        check_types(about, {"config": dict, "classes": list, "weights": str, "nimg": int})
        state = load_file(folder / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise GeneratorError(f"{folder}: not a readable export ({ABOUT}, {WEIGHTS}): {error}") from error
    if wrong := sorted({str(value.dtype) for value in state.values() if not value.is_floating_point()}):
        raise GeneratorError(f"{folder / WEIGHTS}: holds {', '.join(wrong)} instead of weights")
    return state, about
