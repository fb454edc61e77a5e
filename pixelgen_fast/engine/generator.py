"""A trained model with all that is needed to draw with it, and the folder that holds one for others to load.

An exported folder is model.safetensors (one tensor a parameter, native names) and config.json (format, configuration,
class names, which weights). A run folder works wherever an exported one does. Where the model is built on a DINO, both
hold that too, in dino/, and need neither the file nor the hub that it came from.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from pixelgen_fast import config as cfg
from pixelgen_fast import models
from pixelgen_fast.data.cache import published_folder
from pixelgen_fast.diffusion.solver import sample, to_uint8
from pixelgen_fast.engine.checkpoint import CheckpointError, find, read_state, read_weights
from pixelgen_fast.models.teacher import copy_dino

FORMAT = "pixelgen_fast generator 1"
MODEL_PREFIX = "model."
DINO = "dino"  # in the folder of a run or an export, the DINO that its model is built on


class GeneratorError(ValueError):
    """A folder does not hold a generator; the message says what is missing and where one is expected."""


def model_schema(name: str) -> type:
    """The settings dataclass of a system, for config.load."""
    return models.system(name).Config


def build_model(config: cfg.Config, num_classes: int) -> nn.Module:
    """A fresh model, its weights a function of run.seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        return models.system(config.model.system).build(config.model, config.data.image_size, num_classes)


def keep_dino(folder: Path, config: cfg.Config) -> None:
    """Copy the DINO that a model is built on into a folder, in place of an older one; nothing for other models.

    Raises ValueError when model.weights cannot be read, and GeneratorError when the copy cannot be written.
    """
    kept = folder / DINO
    if not hasattr(config.model, "dino") or config.model.weights == str(kept):
        return
    try:
        with published_folder(kept) as work:
            copy_dino(config.model.dino, config.model.weights, work)
    except (OSError, SafetensorError) as error:
        raise GeneratorError(
            f"{kept}: a copy of model.dino cannot be written there ({error}); free some space or choose another folder"
        ) from error


def with_kept_dino(config: cfg.Config, folder: Path) -> cfg.Config:
    """The configuration with model.weights the copy that `keep_dino` left in a folder, where there is one."""
    return _reading(config, str(folder / DINO)) if (folder / DINO).is_dir() else config


def _reading(config: cfg.Config, weights: str) -> cfg.Config:
    """The configuration with other weights of the DINO that its model is built on; the same where it has none."""
    return replace(config, model=replace(config.model, weights=weights)) if hasattr(config.model, "dino") else config


@dataclass
class Generator:
    """A model in evaluation mode, the configuration it was trained with, and the names of its classes."""

    model: nn.Module
    config: cfg.Config
    classes: list[str]
    weights: str
    nimg: int

    def draw(self, labels: Tensor, *, first: int = 0, progress: bool = False, **changes: Any) -> Tensor:
        """Images of the given classes, uint8 [N, S, S, 3].

        labels: int64 [N]. first: number of the first sample; sample n depends on (sample.seed, n) and its label alone.
        changes: steps, solver, guidance, interval, shift, seed or batch, instead of the configuration's.
        Raises ValueError for a label that is not a class.
        """
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(self.classes):
            raise ValueError(
                f"labels run from {int(labels.min())} to {int(labels.max())}; classes are 0 to {len(self.classes) - 1}"
            )
        s, o, size = self.config.sample, self.config.objective, self.config.data.image_size
        settings = {k: getattr(s, k) for k in ("steps", "solver", "guidance", "interval", "shift", "seed", "batch")}
        settings |= changes
        device, dtype = (getattr(next(self.model.parameters()), k) for k in ("device", "dtype"))
        drawn = []
        with tqdm(total=len(labels), desc="draw", unit="img", disable=not progress) as bar:
            # batch by batch, so that no more than one batch is ever held as floats
            for numbers in torch.arange(len(labels)).split(settings["batch"]):
                images = sample(
                    lambda z, t, y: self.model(z.to(dtype), t, y),
                    first + numbers,
                    labels[numbers],
                    shape=(3, size, size),
                    predict=o.predict,
                    noise_scale=o.noise_scale,
                    t_eps=o.t_eps,
                    null_class=len(self.classes),
                    device=device,
                    **settings,
                )
                drawn.append(to_uint8(images).cpu())
                bar.update(len(numbers))
        return torch.cat(drawn)


def load(path: str | Path, weights: str | None = None, device: torch.device | str = "cpu") -> Generator:
    """Load a run folder, a checkpoint folder or an exported folder.

    weights: "raw", "ema" (the first average) or a key such as "ema_0.9999"; None takes the average of a run, and what
    an exported folder holds. Raises GeneratorError for a folder with no generator, and for other weights than it holds.
    """
    path = Path(path)
    if (path / "config.json").is_file():
        state, about = read_exported(path)
        home = path
        if weights is not None and weights != about["weights"]:
            raise GeneratorError(f"{path}: holds {about['weights']} weights, not {weights}; export them from the run")
    elif path.is_dir():
        weights = weights or "ema"
        try:
            folder = find(path)
        except CheckpointError as error:
            raise GeneratorError(f"{error}; nor is there a config.json of an exported one") from error
        home = folder.parent.parent if folder.parent.name == "checkpoints" else folder
        about = read_state(folder) | {"weights": weights}
        state = strip_prefix(read_weights(folder, weights))
    else:
        raise GeneratorError(f"{path}: no such folder; give a run folder or one written by pixelgen export")
    config = with_kept_dino(cfg.from_dict(about["config"], model_schema), home)
    model = build_model(config, len(about["classes"]))
    load_weights(model, state, str(path))
    dtype = next(iter(state.values())).dtype
    return Generator(model.to(device, dtype).eval(), config, about["classes"], about["weights"], about["nimg"])


def strip_prefix(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The generator's own weights among those of the training module."""
    return {name.removeprefix(MODEL_PREFIX): value for name, value in state.items() if name.startswith(MODEL_PREFIX)}


def load_weights(model: nn.Module, state: dict[str, Tensor], origin: str) -> None:
    """Copy weights into a model; what it does not train may be absent. Raises GeneratorError for what does not fit."""
    own = model.state_dict()
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    wrong = [f"missing {name}" for name in own if name not in state and name not in frozen]
    wrong += [f"extra {name}" for name in state if name not in own]
    wrong += [
        f"{name} is {list(state[name].shape)}, the model has {list(value.shape)}"
        for name, value in own.items()
        if name in state and state[name].shape != value.shape
    ]
    if wrong:
        raise GeneratorError(f"{origin}: {len(wrong)} weights do not fit: {'; '.join(wrong[:10])}")
    model.load_state_dict(state, strict=False)


def export(
    folder: Path, state: dict[str, Tensor], config: cfg.Config, classes: list[str], weights: str, nimg: int
) -> None:
    """Write an exported folder. Raises GeneratorError when the folder holds something already, or cannot hold all."""
    if folder.exists() and any(folder.iterdir()):
        raise GeneratorError(f"{folder}: exists and is not empty; choose another folder or remove it")
    folder.mkdir(parents=True, exist_ok=True)
    keep_dino(folder, config)
    settings = cfg.to_dict(_reading(config, DINO))
    about = {"format": FORMAT, "weights": weights, "nimg": nimg, "classes": classes, "config": settings}
    save_file({name: value.contiguous() for name, value in state.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(about, indent=2) + "\n")


def read_exported(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(weights, config.json) of an exported folder. Raises GeneratorError when either is missing or damaged."""
    try:
        about = json.loads((folder / "config.json").read_text())
        state = load_file(folder / "model.safetensors")
    except (OSError, json.JSONDecodeError, SafetensorError) as error:
        raise GeneratorError(f"{folder}: not a readable export (config.json, model.safetensors): {error}") from error
    if about.get("format") != FORMAT:
        raise GeneratorError(f"{folder / 'config.json'}: format {about.get('format')!r}, this version reads {FORMAT!r}")
    return state, about
