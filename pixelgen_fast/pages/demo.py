"""What the page to play with draws: images of chosen classes by one of several models, with the checks of `sample`.

A choice is a run, or an exported folder, with one of its kinds of weights. A model is read when it is first drawn with,
and again once its run has a newer checkpoint; the last KEPT stay in memory.
"""

from __future__ import annotations

import io
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from PIL import Image

from pixelgen_fast import config as cfg
from pixelgen_fast.errors import InputError
from pixelgen_fast.runs import draw
from pixelgen_fast.runs.checkpoint import checkpoints, ema_key
from pixelgen_fast.runs.folder import ABOUT, RunFolder
from pixelgen_fast.settings import Solver

KEPT = 3
MOST_IMAGES = 256
# what the page offers of `Sampling`, where the model uses it; a guide and the batch stay as the run has them
OFFERED = ("seed", "steps", "solver", "guidance", "interval", "shift", "temperature", "passes", "end")
_WHOLE = ("seed", "steps", "passes")


@dataclass(frozen=True)
class Choice:
    """A model to draw with. weights: as `pixelgen sample --weights` takes them."""

    path: Path
    weights: str


class Demo:
    """Draws for any number of readers, one drawing at a time.

    paths: of runs or exported folders. Raises GeneratorError for one without a generator.
    """

    def __init__(self, paths: Sequence[str], device: str) -> None:
        self.device, self.lock = device, threading.Lock()
        self.loaded: OrderedDict[Choice, tuple[str, draw.Generator]] = OrderedDict()
        self.choices: list[Choice] = []
        self.about: list[dict[str, Any]] = []
        for number, path in enumerate(map(Path, paths)):
            newest, found = _newest(path), draw.load(path, None, device)
            kinds = [found.weights]
            if not (path / ABOUT).is_file():
                kinds += [k for k in (*map(ema_key, found.config.optimizer.ema), "raw") if k != found.weights]
            self.choices += [Choice(path, kind) for kind in kinds]
            self._keep(self.choices[-len(kinds)], newest, found)
            self.about += [_about(found, path, kind, number) for kind in kinds]

    def sheet(self, asked: Mapping[str, str], before_pass: Callable[[], object] = lambda: None) -> tuple[bytes, int]:
        """A PNG of the images, a row a class and nothing between them, and the image of the run that the model is of.

        asked: `choice`, its number; `classes`, numbers with commas; `per_class`; and settings of OFFERED as texts.
        before_pass: called before each pass through the network; what it raises ends the drawing.
        Raises InputError, or ValueError of the drawing, in one line.
        """
        number = _whole("choice", asked.get("choice", "0"))
        if not 0 <= number < len(self.choices):
            raise InputError(f"choice is {number}; there are {len(self.choices)}, from 0")
        changes = settings_of(asked)
        rows, columns = _chosen(asked, self.about[number]["classes"])
        labels = torch.tensor(rows).repeat_interleave(columns)
        with self.lock:
            generator = self._generator(self.choices[number])
            images = generator.draw(labels, before_pass=before_pass, **changes).numpy()
        return sheet_png(images, columns), generator.nimg

    def _generator(self, choice: Choice) -> draw.Generator:
        newest = _newest(choice.path)
        if choice not in self.loaded or self.loaded[choice][0] != newest:
            self.loaded.pop(choice, None)
            self._keep(choice, newest, draw.load(choice.path, choice.weights, self.device))
        self.loaded.move_to_end(choice)
        return self.loaded[choice][1]

    def _keep(self, choice: Choice, newest: str, generator: draw.Generator) -> None:
        while len(self.loaded) >= KEPT:
            self.loaded.popitem(last=False)
        self.loaded[choice] = (newest, generator)


def settings_of(asked: Mapping[str, str]) -> dict[str, Any]:
    """The settings of `Sampling` among texts; an empty one is left out, a pair has a comma or is "none".

    Raises InputError.
    """
    changes: dict[str, Any] = {}
    for name in (name for name in OFFERED if asked.get(name, "") != ""):
        text = asked[name]
        if name == "solver":
            if text not in get_args(Solver):
                raise InputError(f"solver is {text!r}; there are {', '.join(get_args(Solver))}")
            changes[name] = text
        elif name == "interval":
            pair = None if text == "none" else tuple(_number(name, part) for part in text.split(","))
            if pair is not None and len(pair) != 2:
                raise InputError(f"interval is {text!r}; give two times, or none")
            changes[name] = pair
        else:
            changes[name] = _whole(name, text) if name in _WHOLE else _number(name, text)
    cfg.check_sampling(cfg.Sampling(**changes), "")
    return changes


def sheet_png(images: np.ndarray, columns: int) -> bytes:
    """Images uint8 [N, H, W, 3], N a multiple of columns, as one PNG with nothing between them."""
    count, height, width, _ = images.shape
    rows = count // columns
    whole = images.reshape(rows, columns, height, width, 3).transpose(0, 2, 1, 3, 4)
    out = io.BytesIO()
    Image.fromarray(whole.reshape(rows * height, columns * width, 3)).save(out, format="PNG")
    return out.getvalue()


def _about(generator: draw.Generator, path: Path, weights: str, number: int) -> dict[str, Any]:
    """What the page needs to know of a choice. number: of its path among those given."""
    sample = generator.config.sample
    used = [name for name in OFFERED if name in generator.model.used_sampling]
    return {
        "run": path.resolve().name,
        "path": number,
        "weights": weights,
        "system": generator.config.model.system,
        "size": generator.config.data.image_size,
        "classes": generator.classes,
        "settings": {f.name: getattr(sample, f.name) for f in fields(cfg.Sampling) if f.name in used},
    }


def _chosen(asked: Mapping[str, str], classes: Sequence[str]) -> tuple[list[int], int]:
    """(classes, images of each)."""
    rows = [_whole("classes", text) for text in asked.get("classes", "").split(",") if text.strip()]
    if not rows:
        raise InputError("choose at least one class")
    if wrong := [row for row in rows if not 0 <= row < len(classes)]:
        raise InputError(f"class {wrong[0]} is none of this model, which has {len(classes)}, from 0")
    columns = _whole("per_class", asked.get("per_class", "4"))
    if columns < 1 or len(rows) * columns > MOST_IMAGES:
        raise InputError(
            f"{len(rows)} classes of {columns} images each; a page draws 1 to {MOST_IMAGES} at once, "
            "pixelgen sample any number"
        )
    return rows, columns


def _whole(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise InputError(f"{name} is {text!r}; it must be a whole number") from error


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise InputError(f"{name} is {text!r}; it must be a number") from error


def _newest(path: Path) -> str:
    """The name of a run's newest checkpoint; nothing for a checkpoint or an exported folder, which stay as they are."""
    return next((found.name for found in checkpoints(RunFolder(path).checkpoints)), "")
