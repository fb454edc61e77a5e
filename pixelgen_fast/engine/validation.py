"""The loss on images that a run never trains on: a function of the weights alone.

    loss(t_j) = mean over held-out images i of L(x_i, t_j, e_ij),    t_j = (j + 1/2) / 8,   j = 0..7
    validation_loss = mean over j of loss(t_j)

L is the training loss without feature alignment, with the image's own label, no dropout and nothing hidden. The noise
e_ij is Philox's for (data.validation.seed, 8 i + j), i the image's number in its data set: the same in every run, at
every time it is measured, on any number of ranks. A sequential generator has no such times: its own loss is taken with
eight fixed draws of each image, those of the numbers 8 i + j.

Two sets of weights are measured: the first average, which is what is drawn and judged (validation_loss, and by time
validation_loss_t...), and the raw ones (validation_loss_raw), which show over-fitting early: an average of many images
lags behind. Whole batches go round the ranks, so that each is computed as one rank would.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from pixelgen_fast import models
from pixelgen_fast.config import Config
from pixelgen_fast.data.cropped import first_readable
from pixelgen_fast.data.held_out import looked_at
from pixelgen_fast.data.storage import patiently
from pixelgen_fast.engine.assemble import Parts
from pixelgen_fast.engine.objective import FlowMatching, TrainingObjective, build_objective
from pixelgen_fast.engine.report import VALIDATION
from pixelgen_fast.engine.zero import RAW
from pixelgen_fast.models.system import BaseSystem, System
from pixelgen_fast.runs.checkpoint import ema_key
from pixelgen_fast.runs.draw import load_weights, strip_prefix

COUNT = 8
TIMES = tuple((j + 0.5) / COUNT for j in range(COUNT))


class Validation:
    """Measures the validation loss of a run. The images are read once, here.

    Raises InputError where none can be read, or one has another size than data.crop=none takes; DataAway.
    """

    def __init__(self, parts: Parts) -> None:
        data, v = parts.config.data, parts.config.data.validation

        def read() -> tuple[np.ndarray, np.ndarray]:
            return first_readable(parts.held, looked_at(parts.held, v.seed), v.images, data.image_size, data.crop)

        numbers, images = patiently(read, data.wait_seconds)
        self.parts, self.batch = parts, v.batch
        self.images, self.labels = torch.from_numpy(images), torch.from_numpy(parts.held.labels[numbers])
        self.numbers = torch.from_numpy(numbers)
        self.objective: TrainingObjective | None = None

    def measure(self, moved: Callable[[], object]) -> dict[str, float]:
        """A row of metrics without its clock. All ranks call it, and all get it. moved: called after each batch."""
        average = self._table(ema_key(self.parts.config.optimizer.ema[0]), moved)
        by_time = average.mean(dim=0)
        both = by_time.mean().item(), self._table(RAW, moved).mean().item()
        row = dict(zip(VALIDATION, both, strict=True))
        if isinstance(self.objective, FlowMatching):
            row |= {f"{VALIDATION[0]}_t{t:g}": loss for t, loss in zip(TIMES, by_time.tolist(), strict=True)}
        return row

    def _table(self, weights: str, moved: Callable[[], object]) -> Tensor:
        """The loss of each image at each time with these weights, float64 [n, 8] on the CPU, the same on every rank."""
        p = self.parts
        state = strip_prefix(p.engine.state_dict(weights))
        if self.objective is None:
            self.objective = validation_objective(models.build_model(p.built, len(p.classes)), p.config)
        model: BaseSystem = self.objective.model
        load_weights(model, state, "the weights of this run")
        model.to(p.device, torch.bfloat16 if p.precision == "bf16" else torch.float32)
        table = torch.zeros(len(self.images), COUNT, dtype=torch.float64)
        try:
            for places in torch.arange(len(self.images)).split(self.batch)[p.rank :: p.world]:
                table[places] = self._losses(places)
                moved()
        finally:
            model.cpu()
        if p.world > 1:
            dist.all_reduce(table, group=p.engine.host_group)  # every other rank has zeros there
        return table

    def _losses(self, places: Tensor) -> Tensor:
        """Of one batch, float64 [n, 8]."""
        to = self.parts.device
        images, labels, numbers = (part[places].to(to) for part in (self.images, self.labels, self.numbers))
        return torch.stack(list(losses_of(self.objective, images, labels, numbers)), dim=1).double().cpu()


def validation_objective(model: BaseSystem, config: Config) -> TrainingObjective:
    """The objective of a model, in evaluation mode, whose draws are those of data.validation.seed."""
    run = replace(config.run, seed=config.data.validation.seed)
    objective = build_objective(model, replace(config, run=run))
    if isinstance(model, System):
        model.grounding_drop = None
    return objective.eval()


@torch.no_grad()
def losses_of(objective: TrainingObjective, images: Tensor, labels: Tensor, numbers: Tensor) -> Iterator[Tensor]:
    """The loss of each image [B] at each of the eight times. numbers: of the images, int64 [B]."""
    for j, t in enumerate(TIMES):
        draws = COUNT * numbers + j
        with torch.random.fork_rng(devices=[images.device] if images.is_cuda else []):
            objective.begin(int(draws[0]))
            if isinstance(objective, FlowMatching):
                parts = objective.losses_at(images, torch.full_like(labels, t, dtype=torch.float32), labels, draws)
            else:
                parts = objective.losses(images, labels, draws)
        yield sum(objective.weights[name] * loss_B for name, loss_B in parts.items())
