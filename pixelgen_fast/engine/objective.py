"""The training objective as a module: what ZeRO wraps, and what a step evaluates.

    x = image / 127.5 - 1,    z = t x + (1 - t) s e,    prediction, tokens = model(z, t, y)
    loss = mean_b [ flow_loss(prediction, x, e, t) + w_f frequency_loss(v of prediction, v) + w_a alignment(tokens, x) ]

The last two are optional (diffusion/frequency.py, engine/alignment.py). On the energy-guided path z and v are others,
and a prediction of x is read as v by the same path (engine/pair.py). A system that guides itself has a weaker
prediction beside its own, which learns by the flow loss too. Time, noise, label drop and grounding drop are functions
of (seed, image number); see diffusion/time.py. Dropout is one of (seed, number of the micro-batch's first image), so
that a resumed run repeats it. A system that fuses its loss noises and compares inside its own operators for predict =
v on the linear path, unless the frequency loss needs its prediction; any other is given z and asked.
Shapes: B images of one micro-batch, S x S pixels.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from pixelgen_kernels import philox
from torch import Tensor, nn

from pixelgen_fast.config import Config, ConfigError, Objective
from pixelgen_fast.diffusion.energy import energy_path
from pixelgen_fast.diffusion.frequency import frequency_loss
from pixelgen_fast.diffusion.path import Noising, slope
from pixelgen_fast.diffusion.time import chosen, drop_labels, sample_times
from pixelgen_fast.engine.alignment import FeatureAlignment
from pixelgen_fast.engine.pair import EnergyPair, LinearPair
from pixelgen_fast.models.system import BaseSystem, SequentialSystem, System
from pixelgen_fast.runs.folder import MODEL


class TrainingObjective(nn.Module, ABC):
    """A generator with its loss: forward(images uint8 [B, S, S, 3], labels, numbers int64 [B]) -> mean loss.

    weights: the parts of the loss with their weights. model: the generator, a child of the name that runs/folder.py
    gives it on disk. parts: the unweighted mean of each part in the last forward pass, detached, 0-dim, on the device.
    alignment: that of features, where there is one.
    """

    def __init__(
        self,
        model: BaseSystem,
        objective: Objective,
        seed: int,
        null_class: int,
        alignment: FeatureAlignment | None = None,
    ) -> None:
        super().__init__()
        self.add_module(MODEL, model)
        self.alignment = alignment
        self.objective, self.seed, self.null_class = objective, seed, null_class
        self.weights: dict[str, float] = {}
        self.parts: dict[str, Tensor] = {}

    @property
    def columns(self) -> list[str]:
        """The parts of the loss that have columns of their own in the metrics: none if it has but one."""
        return list(self.weights) if len(self.weights) > 1 else []

    @property
    def draws(self) -> bool:
        """Whether a forward pass draws from torch's generator."""
        return self.model.draws

    def begin(self, first: int) -> None:
        """Begin a micro-batch whose first image has this number, before forward: seeds torch for a model that draws."""
        if self.draws:
            digest = hashlib.blake2b(f"dropout {self.seed} {first}".encode(), digest_size=8).digest()
            torch.manual_seed(int.from_bytes(digest))

    def forward(self, images: Tensor, labels: Tensor, numbers: Tensor) -> Tensor:
        y = drop_labels(self.seed, numbers, labels, self.objective.class_drop, self.null_class)
        means = {name: loss_B.mean() for name, loss_B in self.losses(images, y, numbers).items()}
        self.parts = {name: mean.detach() for name, mean in means.items()}
        return sum(self.weights[name] * mean for name, mean in means.items())

    @abstractmethod
    def losses(self, images: Tensor, y: Tensor, numbers: Tensor) -> dict[str, Tensor]:
        """The parts of each image's loss [B]; y: labels, those that are dropped being null_class."""


class SequenceLoss(TrainingObjective):
    """The loss that a sequential generator has of its own."""

    def __init__(self, model: SequentialSystem, objective: Objective, seed: int, null_class: int) -> None:
        super().__init__(model, objective, seed, null_class)
        self.weights = dict(model.loss_weights)

    def losses(self, images: Tensor, y: Tensor, numbers: Tensor) -> dict[str, Tensor]:
        return self.model(images, y, numbers, self.seed, self.objective)


class FlowMatching(TrainingObjective):
    """Flow matching on a generator; its parts are "flow" and, where they are on, "base", "frequency", "alignment".

    path: None is the linear one. aligns: whether the next micro-batch has images whose tokens follow the teacher's.
    Raises ConfigError for the energy-guided path of what is no image.
    """

    def __init__(
        self,
        model: System,
        objective: Objective,
        seed: int,
        null_class: int,
        alignment: FeatureAlignment | None = None,
    ) -> None:
        super().__init__(model, objective, seed, null_class, alignment)
        self.path = energy_path(objective.path, objective.sigma0, objective.release)
        if self.path is not None:
            _check_pixels(model)
        self.weights = {"flow": 1.0}
        if model.guides_itself:
            self.weights["base"] = 1.0
        if objective.frequency_weight > 0:
            self.weights["frequency"] = objective.frequency_weight
        if alignment is not None:
            self.weights["alignment"] = alignment.weight
        self.aligns = alignment is not None

    def begin(self, first: int) -> None:
        super().begin(first)
        self.aligns = self.alignment is not None and self.alignment.acts_at(first)

    def losses(self, images: Tensor, y: Tensor, numbers: Tensor) -> dict[str, Tensor]:
        o = self.objective
        t = sample_times(self.seed, numbers, o.time, o.time_mean, o.time_std, o.time_shift, least=o.time_min)
        losses, tokens = self._compared(images, t, y, numbers)
        if self.alignment is not None:
            losses["alignment"] = self.alignment(tokens, images, numbers)
        return losses

    def losses_at(self, images: Tensor, t: Tensor, y: Tensor, numbers: Tensor) -> dict[str, Tensor]:
        """The parts of each image's loss [B] at these times [B] in place of drawn ones, without the alignment's."""
        return self._compared(images, t, y, numbers)[0]

    def _compared(
        self, images: Tensor, t: Tensor, y: Tensor, numbers: Tensor
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """Losses of each image at its time, and the tapped tokens."""
        o = self.objective
        fused = self.path is None and o.predict == "v" and o.frequency_weight == 0 and self.model.fuses_loss
        return (self._inside if fused else self._outside)(images, t, y, numbers)

    def _inside(self, images: Tensor, t: Tensor, y: Tensor, numbers: Tensor) -> tuple[dict[str, Tensor], Tensor | None]:
        """Losses of each image and the tapped tokens, from a model that noises and compares by itself."""
        o = self.objective
        weight_B = slope(t, "v", o.loss, o.noise_scale, o.t_eps).square()
        noising = Noising(numbers, t, self.seed, o.noise_scale)
        loss_B, tokens = self._tapped(self.model.velocity_loss, images, y, noising, weight_B)
        return {"flow": loss_B}, tokens

    def _outside(
        self, images: Tensor, t: Tensor, y: Tensor, numbers: Tensor
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """Losses of each image and the tapped tokens, from the model's prediction at z."""
        o = self.objective
        x, e = Noising(numbers, t, self.seed, o.noise_scale).pair(self.model.encode(images))
        pair = LinearPair(o, x, e, t) if self.path is None else EnergyPair(o, self.path, x, e, t)
        drop = self.model.grounding_drop
        options = {} if drop is None else {"ground": ~chosen(self.seed, numbers, drop, philox.GROUNDING_DROP)}
        if self.model.guides_itself:
            options["both"] = True
        model = partial(self.model, **options)
        answer, tokens = self._tapped(model, pair.z.to(next(self.model.parameters()).dtype), t, y)
        prediction, *weaker = answer if self.model.guides_itself else (answer,)
        losses = {name: pair.flow(p) for name, p in zip(("flow", "base"), (prediction, *weaker), strict=False)}
        if o.frequency_weight > 0:
            losses["frequency"] = frequency_loss(*pair.velocities(prediction), o.frequency_quality)
        return losses, tokens

    def _tapped(self, function: Callable[..., Any], *arguments: Any) -> tuple[Tensor, Tensor | None]:
        """What the model answers, with the tokens at the alignment's layer if they are to follow the teacher's."""
        if not self.aligns:
            return function(*arguments), None
        return function(*arguments, tap=self.alignment.layer)


def _check_pixels(model: System) -> None:
    """Refuse to blur what is no image."""
    shape, side = tuple(model.sample_shape), model.image_size
    if shape != (3, side, side):
        raise ConfigError(
            f"objective.path is energy_guided, which blurs images, and {type(model).__name__} flows to {list(shape)} "
            f"instead of [3, {side}, {side}]; use objective.path=linear"
        )


def build_objective(model: BaseSystem, config: Config, alignment: FeatureAlignment | None = None) -> TrainingObjective:
    """The objective of a run on its generator."""
    seed, classes = config.run.seed, model.num_classes
    if isinstance(model, SequentialSystem):
        return SequenceLoss(model, config.objective, seed, classes)
    return FlowMatching(model, config.objective, seed, classes, alignment)
