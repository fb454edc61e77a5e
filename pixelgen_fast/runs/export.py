"""The folder that holds a trained model for others to load: one tensor a parameter in safetensors, and config.json.

config.json has the format, the configuration, the class names, which weights they are, and the published weights that
they began from, whose licence goes with them. Large models are several files (weight_files.py). Where the model is
built on a DINO, a tokenizer or an autoencoder, the folder holds that too, and needs neither the files nor the hub where
it was.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from pixelgen_fast import config as cfg
from pixelgen_fast.errors import InputError
from pixelgen_fast.runs.folder import ABOUT, PUBLISHED, WEIGHTS
from pixelgen_fast.runs.kept import inside, keep
from pixelgen_fast.runs.plain import check_types, read_object
from pixelgen_fast.runs.weight_files import SHARD_BYTES, load_weights, save_weights

FORMAT = "pixelgen_fast generator 1"
IMPORTED = "imported"  # data.root of published weights


class GeneratorError(InputError):
    """A folder does not hold a generator; the message says what is missing and where one is expected."""


def export(
    folder: Path,
    state: dict[str, Tensor],
    config: cfg.Config,
    classes: list[str],
    weights: str,
    nimg: int,
    published: Sequence[str] = (),
    limit: int = SHARD_BYTES,
) -> None:
    """Write an exported folder. Raises GeneratorError when the folder holds something already, or cannot hold all.

    published: systems of interop/ whose published weights these began from. limit: bytes of a file of weights.
    """
    take_folder(folder)
    keep(folder, config)
    settings = cfg.to_dict(inside(config))
    about = {"format": FORMAT, "weights": weights, "nimg": nimg, "classes": classes, "config": settings}
    about[PUBLISHED] = [*published]
    save_weights(state, folder / WEIGHTS, limit)
    (folder / ABOUT).write_text(json.dumps(about, indent=2) + "\n")


def take_folder(folder: Path) -> None:
    """Make a folder. Raises GeneratorError when it holds something already."""
    if folder.is_file() or (folder.exists() and any(folder.iterdir())):
        raise GeneratorError(f"{folder}: exists and is not empty; choose another folder or remove it")
    folder.mkdir(parents=True, exist_ok=True)


def read_exported(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(weights, config.json) of an exported folder.

    Raises GeneratorError when either is missing or damaged, has other types, or is of another format.
    """
    try:
        about = read_object(folder / ABOUT)
        if about.get("format") != FORMAT:
            raise ValueError(f"format {about.get('format')!r}, this version reads {FORMAT!r}")
        check_types(about, {"config": dict, "classes": list, "weights": str, "nimg": int})
        state = load_weights(folder / WEIGHTS)
    except (OSError, ValueError) as error:
        raise GeneratorError(f"{folder}: not a readable export ({ABOUT}, {WEIGHTS}): {error}") from error
    if wrong := sorted({str(value.dtype) for value in state.values() if not value.is_floating_point()}):
        raise GeneratorError(f"{folder / WEIGHTS}: holds {', '.join(wrong)} instead of weights")
    return state, about


def published_in(about: dict[str, Any]) -> list[str]:
    """Systems of interop/ whose published weights those of an export, or a checkpoint, began from, by its JSON."""
    if isinstance(names := about.get(PUBLISHED), list):
        return [str(name) for name in names]
    # before it was written down, the configuration told
    data, model = (about["config"].get(section) for section in ("data", "model"))
    if isinstance(data, dict) and isinstance(model, dict) and data.get("root") == IMPORTED:
        return [str(model.get("system"))]
    return []
