"""The training pair of a batch: the noised images z, and what a network's prediction at them is compared with.

    linear          flow_loss of the prediction of x, v or e (diffusion/loss.py)
    energy guided   mean (v of the prediction - v)^2, the prediction being of v or x (diffusion/energy.py)

The truth goes the same way as the prediction, so that t_eps never moves the minimum of a loss.
Shapes: B images [B, C, H, W]; t, losses [B].
"""

from __future__ import annotations

import torch
from torch import Tensor

from pixelgen_fast.config import Objective
from pixelgen_fast.diffusion.energy import EnergyPath
from pixelgen_fast.diffusion.loss import flow_loss
from pixelgen_fast.diffusion.path import add_noise, convert, truth, widen


class LinearPair:
    """Data x and noise e on the linear path at times t."""

    def __init__(self, objective: Objective, x: Tensor, e: Tensor, t: Tensor) -> None:
        self.objective, self.x, self.e, self.t = objective, x, e, t
        self.z = add_noise(x, e, t, objective.noise_scale)

    def flow(self, prediction: Tensor) -> Tensor:
        """The flow-matching loss of each image [B]."""
        o = self.objective
        return flow_loss(
            prediction, self.x, self.e, self.t, predict=o.predict, loss_space=o.loss, noise_scale=o.noise_scale,
            t_eps=o.t_eps,
        )  # fmt: skip

    def velocities(self, prediction: Tensor) -> tuple[Tensor, Tensor]:
        """The prediction and the truth, both read as v."""
        o = self.objective
        wanted = truth(o.predict, self.x, self.e, o.noise_scale)
        path = {"noise_scale": o.noise_scale, "t_eps": o.t_eps}
        found, wanted = (convert(value, self.z, self.t, o.predict, "v", **path) for value in (prediction, wanted))
        return found, wanted


class EnergyPair:
    """The same on the energy-guided path; nothing of it takes a gradient but a prediction of x."""

    def __init__(self, objective: Objective, path: EnergyPath, x: Tensor, e: Tensor, t: Tensor) -> None:
        self.path, self.t, self.t_eps, self.reads_x = path, t, objective.t_eps, objective.predict == "x"
        with torch.no_grad():
            end = path.endpoint(x, t)
            self.z = end.noised(e, objective.noise_scale)
            self.v = end.velocity_at(self.z, self.t_eps) if self.reads_x else end.velocity(e, objective.noise_scale)

    def flow(self, prediction: Tensor) -> Tensor:
        """The flow-matching loss of each image [B]."""
        found, wanted = self.velocities(prediction)
        return (found - wanted).square().flatten(1).mean(dim=1)

    def velocities(self, prediction: Tensor) -> tuple[Tensor, Tensor]:
        """The prediction, read as v, and v."""
        if not self.reads_x:
            return widen(prediction), self.v
        return self.path.endpoint(prediction, self.t).velocity_at(self.z, self.t_eps), self.v
