"""A trained model with all that is needed to draw with it, from a run, a checkpoint or an exported folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from pixelgen_fast import config as cfg
from pixelgen_fast import errors, hub
from pixelgen_fast.config import Sampling
from pixelgen_fast.diffusion.energy import energy_path
from pixelgen_fast.diffusion.path import convert
from pixelgen_fast.diffusion.solver import Model, Pair, sample, to_uint8
from pixelgen_fast.models import build_model, model_schema
from pixelgen_fast.models.system import BaseSystem, SequentialSystem, System
from pixelgen_fast.runs.checkpoint import RUN, CheckpointError, ema_key, find, read_state, read_weights
from pixelgen_fast.runs.export import GeneratorError, published_in, read_exported
from pixelgen_fast.runs.few_rows import as_among_many
from pixelgen_fast.runs.folder import ABOUT, CHECKPOINTS, DIFFUSERS, MODEL_PREFIX, names_a_folder
from pixelgen_fast.runs.kept import with_kept
from pixelgen_fast.weights import misfits

_LARGEST_TABLES = 2**32


@dataclass
class Generator:
    """A model in evaluation mode, the configuration it was trained with, and the names of its classes.

    guides: those that it has been guided by, by their folder. published: systems of interop/ whose published weights
    these began from.
    """

    model: BaseSystem
    config: cfg.Config
    classes: list[str]
    weights: str
    nimg: int
    guides: dict[str, Generator] = field(default_factory=dict)
    published: list[str] = field(default_factory=list)

    def draw(self, labels: Tensor, **options: Any) -> Tensor:
        """Images of the given classes, uint8 [N, S, S, 3]; see `batches`."""
        return torch.cat([images for _, images in self.batches(labels, **options)])

    def batches(
        self,
        labels: Tensor,
        *,
        first: int = 0,
        progress: bool = False,
        before_pass: Callable[[], object] = lambda: None,
        share: tuple[int, int] = (0, 1),
        **changes: Any,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Images of the given classes as they are drawn: places among labels int64 [n], and uint8 [n, S, S, 3], on CPU.

        labels: int64 [N]. first: number of the first sample; sample n depends on (sample.seed, n) and its label alone.
        before_pass: called before each pass through the network; what it raises ends the drawing.
        share: (r, W) draws every W-th batch from the r-th on.
        changes: what of `Sampling` differs from the configuration's.
        Raises ValueError for a label that is not a class, or a setting that the model would ignore.
        """
        self._check_labels(labels)
        settings = {f.name: getattr(self.config.sample, f.name) for f in fields(Sampling)} | changes
        self.model.check_settings(self.config.objective, Sampling(**settings))
        # batch by batch, so that no more than one batch is ever held as floats
        shared = torch.arange(len(labels)).split(settings["batch"])[share[0] :: share[1]]
        with tqdm(total=sum(map(len, shared)), desc="draw", unit="img", disable=not progress) as bar:
            for numbers in shared:
                with as_among_many(len(numbers), next(self.model.parameters()).device):
                    images = self._sample(first + numbers, labels[numbers], before_pass, settings)
                errors.begin()
                bar.update(len(numbers))
                yield numbers, to_uint8(images).cpu()

    def _sample(
        self, numbers: Tensor, labels: Tensor, before_pass: Callable[[], object], settings: dict[str, Any]
    ) -> Tensor:
        """Samples of these numbers [n] and labels [n], float32 [n, 3, S, S] on the model's device."""
        o, like = self.config.objective, next(self.model.parameters())
        if isinstance(self.model, SequentialSystem):
            drawn = (labels.to(like.device), numbers.to(like.device))
            with torch.no_grad():
                return self.model.draw(*drawn, Sampling(**settings), o, before_pass)

        def network(z: Tensor, t: Tensor, y: Tensor) -> Tensor:
            before_pass()
            return self.model(z.to(like.dtype), t, y)

        x = sample(
            network,
            numbers,
            labels,
            pair=self._pair(network, settings["guide"], before_pass) if settings["guidance"] != 1 else None,
            shape=self.model.sample_shape,
            predict=o.predict,
            noise_scale=o.noise_scale,
            t_eps=o.t_eps,
            path=energy_path(o.path, o.sigma0, o.release),
            null_class=len(self.classes),
            device=like.device,
            **{name: value for name, value in settings.items() if name in self.model.used_sampling and name != "guide"},
        )
        with torch.no_grad():
            return self.model.decode(x)

    def _pair(self, network: Model, guide: str | None, before_pass: Callable[[], object]) -> Pair | None:
        """The weaker prediction and the model's own, where it is not the null class that guidance leads away from."""
        if guide is not None:
            return against_model(network, self.guide(guide), self.config.objective)
        if not self.model.guides_itself:
            return None
        dtype = next(self.model.parameters()).dtype

        def pair(z: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            before_pass()
            prediction, weaker = self.model(z.to(dtype), t, y, both=True)
            return weaker, prediction

        return pair

    def guide(self, path: str) -> Generator:
        """The generator of sample.guide, where the model is. Raises GeneratorError for one that does not fit."""
        if path not in self.guides:
            self.guides[path] = load(path, alone=True)
            check_guide(self, self.guides[path], path)
        found = self.guides[path]
        found.model.to(next(self.model.parameters()).device)
        return found

    def _check_labels(self, labels: Tensor) -> None:
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(self.classes):
            raise ValueError(
                f"labels run from {int(labels.min())} to {int(labels.max())}; classes are 0 to {len(self.classes) - 1}"
            )


def check_guide(generator: Generator, guide: Generator, path: str) -> None:
    """Raise GeneratorError, naming what differs, for a guide of other samples, classes, noise or another path."""

    def kind(g: Generator) -> dict[str, Any]:
        shape = [*g.model.sample_shape] if isinstance(g.model, System) else "no flow"
        o, names = g.config.objective, ["noise_scale", "path"]
        if o.path != "linear":  # what a network says of x or v there is not read as the other
            names += ["sigma0", "release", "predict"]
        settings = {f"objective.{name}": getattr(o, name) for name in names}
        return {"samples": shape, "number of classes": len(g.classes)} | settings

    own, theirs = kind(generator), kind(guide)
    both = [name for name in own if name in theirs]
    if wrong := [f"{name} {theirs[name]} instead of {own[name]}" for name in both if own[name] != theirs[name]]:
        raise GeneratorError(f"sample.guide {path} does not go with this model: {'; '.join(wrong)}")


def against_model(network: Model, guide: Generator, objective: cfg.Objective) -> Pair:
    """The guide's prediction, read as the network's kind, and the network's own. objective: of the network."""
    theirs, dtype = guide.config.objective, next(guide.model.parameters()).dtype

    def pair(z: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        weaker = guide.model(z.to(dtype), t, y)
        scale = objective.noise_scale
        return convert(weaker, z, t, theirs.predict, objective.predict, scale, theirs.t_eps), network(z, t, y)

    return pair


def load(
    path: str | Path, weights: str | None = None, device: torch.device | str = "cpu", *, alone: bool = False
) -> Generator:
    """Load a run folder, a checkpoint folder or an exported folder, this also from the hub (hub.py).

    weights: "raw", "ema" (the first of optimizer.ema, which the grids of training show) or a key such as "ema_0.9999";
    None takes "ema" of a run, and what an exported folder holds. alone: for predictions only.
    Raises GeneratorError for a folder with no generator, and for other weights than it holds.
    """
    path = hub.local(path)
    if (path / ABOUT).is_file():
        state, about = read_exported(path)
        home = path
        if weights is not None and weights != about["weights"]:
            raise GeneratorError(f"{path}: holds {about['weights']} weights, not {weights}; export them from the run")
    elif path.is_dir():
        try:
            folder = find(path)
        except CheckpointError as error:
            if (path / DIFFUSERS).is_file():
                raise GeneratorError(
                    f"{path}: is a form for diffusers, which opens it; give the run, or an export without --format"
                ) from error
            raise GeneratorError(f"{error}; nor is there a config.json of an exported one") from error
        home = folder.parent.parent if folder.parent.name == CHECKPOINTS else folder
        about = read_state(folder, RUN)
        if weights in (None, "ema"):
            weights = ema_key(_configuration(about, path).optimizer.ema[0])
        about["weights"] = weights
        state = strip_prefix(read_weights(folder, weights))
    else:
        raise GeneratorError(f"{path}: no such folder; give a run folder or one written by pixelgen export")
    _check_classes(about["classes"], path)
    config = _configuration(about, path)
    config = replace(config, model=config.model.alone()) if alone else with_kept(config, home)
    _check_size(config, state, len(about["classes"]), path)
    model = build_model(config, len(about["classes"]))
    load_weights(model, state, str(path))
    # of the parameters: tables keep their own
    dtype = next(state[name].dtype for name, _ in model.named_parameters() if name in state)
    model = model.to(device, dtype).eval()
    return Generator(model, config, about["classes"], about["weights"], about["nimg"], published=published_in(about))


def load_for_other_classes(model: BaseSystem, state: dict[str, Tensor], origin: str) -> str:
    """Copy weights into a model that may have other classes. Returns what to say of it; nothing where they are as many.

    The table of other classes begins as the model's own, but for the row of no class, which guidance needs.
    Raises GeneratorError for what does not fit.
    """
    there, own = state.get(model.class_table), model.state_dict()[model.class_table]
    said = ""
    if there is not None and there.shape[1:] == own.shape[1:] and len(there) != len(own):
        table = torch.cat([own[:-1], there[-1:].to(own)])
        state = {**state, model.class_table: table}
        said = f"{origin} knows {len(there) - 1:,} classes and this run {len(own) - 1:,}: their table begins anew"
    load_weights(model, state, origin)
    return said


def _configuration(about: dict[str, Any], path: Path) -> cfg.Config:
    try:
        return cfg.from_dict(about["config"], model_schema)
    except cfg.ConfigError as error:
        raise GeneratorError(f"{path}: {error}") from error


def _check_classes(classes: list[str], origin: Path) -> None:
    """A class is the name of a folder of drawn images: one that leads elsewhere is refused."""
    if not classes:
        raise GeneratorError(f"{origin}: classes is empty; a generator has at least one")
    for name in classes:
        if not names_a_folder(name):
            raise GeneratorError(f"{origin}: class {name!r} cannot name a folder; a class has a name without /")


def _check_size(config: cfg.Config, state: dict[str, Tensor], num_classes: int, origin: Path) -> None:
    """Refuse a configuration of another size than its weights before memory is taken for it."""
    with torch.device("meta"):
        model = build_model(config, num_classes)
    check_weights(model, state, str(origin))
    size, tables = config.data.image_size, sum(b.nbytes for b in model.buffers())
    if tables > _LARGEST_TABLES:
        raise GeneratorError(
            f"{origin}: data.image_size {size} needs tables of {tables / 1e9:,.0f} GB; is it so large?"
        )


def strip_prefix(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The generator's own weights among those of the training module."""
    return {name.removeprefix(MODEL_PREFIX): value for name, value in state.items() if name.startswith(MODEL_PREFIX)}


def load_weights(model: nn.Module, state: dict[str, Tensor], origin: str) -> None:
    """Copy weights into a model; what it does not train may be absent. Raises GeneratorError for what does not fit."""
    check_weights(model, state, origin)
    model.load_state_dict(state, strict=False)


def check_weights(model: nn.Module, state: dict[str, Tensor], origin: str) -> None:
    """Raise GeneratorError for weights that do not fit a model, by name; what it does not train may be absent."""
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    if wrong := misfits(state, model.state_dict(), optional=frozen):
        raise GeneratorError(f"{origin}: {len(wrong)} weights do not fit: {'; '.join(wrong[:10])}")
