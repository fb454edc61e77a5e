"""The training objective as a module: what ZeRO wraps, and what a step evaluates.

    x = image / 127.5 - 1,    z = t x + (1 - t) s e,    loss = mean_b flow_loss(model(z, t, y), x, e, t)

Time, noise and label drop are functions of (seed, image number); see diffusion/time.py. A model with
`velocity_loss` and predict = v noises and compares inside its own operators; any other is given z and asked.
Shapes: B images of one micro-batch, S x S pixels.
"""

from __future__ import annotations

from einops import rearrange
from torch import Tensor, nn

from pixelgen_fast.config import Objective
from pixelgen_fast.diffusion.loss import flow_loss
from pixelgen_fast.diffusion.path import add_noise, slope
from pixelgen_fast.diffusion.time import drop_labels, noise, sample_times
from pixelgen_fast.models.layers import Noising


class FlowMatching(nn.Module):
    """Flow matching on a generator: forward(images uint8 [B, S, S, 3], labels, numbers int64 [B]) -> mean loss."""

    def __init__(self, model: nn.Module, objective: Objective, seed: int, null_class: int) -> None:
        super().__init__()
        self.model, self.objective, self.seed, self.null_class = model, objective, seed, null_class

    def forward(self, images: Tensor, labels: Tensor, numbers: Tensor) -> Tensor:
        o = self.objective
        t = sample_times(self.seed, numbers, o.time, o.time_mean, o.time_std, o.time_shift)
        y = drop_labels(self.seed, numbers, labels, o.class_drop, self.null_class)
        if o.predict == "v" and hasattr(self.model, "velocity_loss"):
            weight_B = slope(t, "v", o.loss, o.noise_scale, o.t_eps).square()
            noising = Noising(numbers, t, self.seed, o.noise_scale)
            return self.model.velocity_loss(images, y, noising, weight_B).mean()
        x = rearrange(images, "B H W C -> B C H W").float() / 127.5 - 1.0
        e = noise(self.seed, numbers, x.shape[1:])
        z = add_noise(x, e, t, o.noise_scale).to(next(self.model.parameters()).dtype)
        loss_B = flow_loss(
            self.model(z, t, y),
            x,
            e,
            t,
            predict=o.predict,
            loss_space=o.loss,
            noise_scale=o.noise_scale,
            t_eps=o.t_eps,
        )
        return loss_B.mean()
