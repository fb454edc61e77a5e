"""Muon for matrices, AdamW for the rest, averages of both, on whatever shards of them a rank owns.

Of a matrix with clipped gradient g, momentum mu, rate lr, decay w (Jordan et al., kellerjordan.github.io/posts/muon):

    m <- mu m + (1 - mu) g
    u  = (1 - mu) g + mu m                         Nesterov
    o  = Newton-Schulz of u, about the nearest orthogonal matrix U V^T of u = U S V^T
    p <- (1 - lr w) p - lr f o                     f = 0.2 sqrt(max(rows, columns))    match_rms_adamw
                                                   f = sqrt(max(1, rows / columns))    original
    a <- d a + (1 - d) p                           for each average a with its decay d

The first f makes the update as large as AdamW's usual one, so that one rate and decay serve both (arXiv 2502.16982,
section 2.2). The momentum, the weights and the averages are updated where they lie, in any pieces; u alone is needed
whole, and CutMatrices brings it together. Whatever the accumulation and the stage, the step sees the mean gradient of
the global batch, once.

Newton-Schulz, X of Frobenius norm 1, at most as many rows as columns:

    S = X X^T,    X <- 3.4445 X + (-4.7750 S + 2.0315 S S) X

Five steps take singular values from 0.01 to 1 into [0.68, 1.14]: not to 1, but fast there (tests/engine/test_muon.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pixelgen_fast.engine.cut_matrices import CutMatrices
from pixelgen_fast.engine.optimizer import AdamWEMA, Now, Place
from pixelgen_fast.settings import MuonScale

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
MOMENTUM = "momentum"
_TINY = 1e-30


def newton_schulz(x: Tensor, steps: int = 5) -> Tensor:
    """Orthogonalise matrices about: [n, rows, columns] -> the same, in the type of x. A matrix of zeros stays so."""
    if x.shape[-2] > x.shape[-1]:
        return newton_schulz(x.mT, steps).mT
    a, b, c = COEFFICIENTS
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    x = (x / norm.clamp(min=_TINY)).to(x.dtype)
    for _ in range(steps):
        s = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(s, s, s, beta=b, alpha=c), x, beta=a)
    return x


def update_scale(rows: int, columns: int, scale: MuonScale) -> float:
    """What an orthogonalised update is multiplied by."""
    if scale == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1.0, rows / columns))


class Muon(AdamWEMA):
    """AdamWEMA in which one group, of matrices, is trained by Muon.

    params: param groups. That of the matrices has `stacked`, {parameter [n rows, columns]: n} of its parameters in
    their order, where n matrices lie one over another and are orthogonalised each; and `momentum`, `scale` and `steps`
    (newton_schulz, update_scale). The state of its parameters is `momentum` and the averages. Its gradients are used up
    in a step. On a GPU the iteration runs in bf16, on a CPU in float32.

    Where parameters are not whole on this rank, or lie flattened in others, say where they do (`locate`).
    """

    stages = (1, 2)

    def __init__(self, params: list[dict[str, Any]], **settings: Any) -> None:
        super().__init__(params, **settings)
        (self._stacked,) = [group["stacked"] for group in self.param_groups if "stacked" in group]
        self._cut: CutMatrices | None = None

    def moments(self, group: dict[str, Any]) -> list[str]:
        return [MOMENTUM] if "stacked" in group else super().moments(group)

    def locate(self, places: Mapping[nn.Parameter, Place]) -> None:
        """Tell where this rank's pieces of all parameters lie in those it steps. All ranks must call it."""
        self._cut = CutMatrices(self._stacked, places)

    def update(self, group: dict[str, Any], params: list[Tensor], now: Now) -> None:
        if "stacked" not in group:
            super().update(group, params, now)
            return
        if self._cut is None:
            self.locate({p: Place(p, 0, 0, p.numel()) for p in self._stacked})
        for param in group["params"]:
            if param.grad is None:  # which ranks and stages that flatten gradients have as zeros
                param.grad = torch.zeros_like(param)
            _add_momentum_(self.init_state(param, group)[MOMENTUM], param.grad, group["momentum"], now)
        self._orthogonalise_gradients(group)
        keep, keys = (~now.skip).float(), self.ema_keys(group)
        weights = [(keep * (1.0 - decay)).float() for decay in self.decays(now.step)[: len(keys)]]
        for param in group["params"]:
            param.mul_(1.0 - keep * (group["lr"] * group["weight_decay"]))
            param.addcmul_(param.grad, keep, value=-group["lr"])
            for key, weight in zip(keys, weights, strict=True):
                self.state[param][key].lerp_(param, weight)
            if (copy := self.copies.get(param)) is not None:
                copy.copy_(param)

    def _orthogonalise_gradients(self, group: dict[str, Any]) -> None:
        """Replace the gradients, which are the updates u by now, by f o."""

        def direction(x: Tensor) -> Tensor:
            return newton_schulz(x, group["steps"]).mul_(update_scale(*x.shape[1:], group["scale"]))

        flat = {param: param.grad.view(-1) for param in group["params"]}
        self._cut.map_(flat, direction, torch.bfloat16 if group["params"][0].is_cuda else torch.float32)


def _add_momentum_(momentum: Tensor, grad: Tensor, mu: float, now: Now) -> None:
    """m <- mu m + (1 - mu) g, and the gradient becomes the update u; a step to be skipped leaves m, and u = m."""
    grad.mul_(now.grad_scale)
    torch.where(now.skip, momentum, grad, out=grad)
    momentum.lerp_(grad, 1.0 - mu)
    grad.lerp_(momentum, mu)
