"""AdamW with weight averages as optimizer state, on whatever shard of the parameters it is given.

The averages live beside the moments, so that sharding them needs nothing of its own: DeepSpeed hands this optimizer
flat fp32 shards at every ZeRO stage, and one element-wise pass (`pixelgen_kernels.adamw_ema`) updates weights,
moments and averages. Nothing is gathered in a step.

EMA with warm-up (off by default), s = number of the step, 1 for the first:

    d_s = min(decay, (1 + s) / (10 + s)),      ema <- d_s ema + (1 - d_s) p

A step whose global gradient norm is not finite changes no weight, moment, average or step count; it is counted. The
gradient is clipped by a factor that the same pass applies. All of it stays on the device: the host never waits.
`counters` = (steps applied, steps skipped, steps skipped in a row).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from pixelgen_kernels.adamw_ema import adamw_ema_foreach, total_norm
from torch import Tensor, nn

from pixelgen_fast.runs.checkpoint import ema_key

APPLIED, SKIPPED, SKIPPED_IN_A_ROW = range(3)
COUNTERS = ("step", "skipped", "skipped_in_a_row")


class Now(NamedTuple):
    """A step, on the device: its number, 1 for the first; whether it must change nothing; the gradient's factor."""

    step: Tensor
    skip: Tensor
    grad_scale: float | Tensor


class Place(NamedTuple):
    """Elements [start, start + length) of a flattened parameter are those of `holder`, flattened, from `offset` on."""

    holder: Tensor
    offset: int
    start: int
    length: int


class AdamWEMA(torch.optim.Optimizer):
    """AdamW (decoupled weight decay) with one exponential moving average of the weights for each decay.

    params: parameters or param groups. A group may set `lr`, `weight_decay`, `betas`, `eps`, and `ema: bool` (False:
    trained, not averaged). clip_norm: bound on the global gradient norm, or None.
    ema_decays: distinct values in [0, 1). ema_warmup: the formula above.
    State of each parameter: `exp_avg`, `exp_avg_sq` (zeros at the start) and `ema_<decay>` (a copy of the weights).

    Used alone, it judges a step by the norm of the gradients it holds. Under ZeRO it holds a shard only and is called
    once for each group, so `grad_norm` is set to a function that returns the global norm, and whoever sets it calls
    `end_step(norm)` once after each step. `copies`: bf16 tensors of parameters, which a step writes as well.

    Raises ValueError for decays, betas, learning rates or weight decays out of range.
    """

    stages = (1, 2, 3)  # of ZeRO, at which it can be used

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        ema_decays: Sequence[float] = (0.9999,),
        ema_warmup: bool = False,
        clip_norm: float | None = None,
    ) -> None:
        self.ema_decays = tuple(float(d) for d in ema_decays)
        self.ema_warmup = ema_warmup
        self.clip_norm = clip_norm
        self.grad_norm: Callable[[], Tensor | float] | None = None
        self.copies: dict[Tensor, Tensor] = {}
        self.norm: Tensor | float = 0.0  # of the last step, before clipping, where this optimizer took it itself
        if any(not 0.0 <= d < 1.0 for d in self.ema_decays) or len(set(self.ema_decays)) < len(self.ema_decays):
            raise ValueError(f"ema_decays must be distinct and in [0, 1), got {list(ema_decays)}")
        if clip_norm is not None and not clip_norm > 0.0:
            raise ValueError(f"clip_norm must be positive, or None for no clipping, got {clip_norm}")
        super().__init__(params, dict(lr=lr, betas=tuple(betas), eps=eps, weight_decay=weight_decay, ema=True))
        for number, group in enumerate(self.param_groups):
            _check_group(number, group)
        device = self.param_groups[0]["params"][0].device
        self.counters = torch.zeros(3, dtype=torch.int64, device=device)

    def ema_keys(self, group: dict[str, Any]) -> list[str]:
        """The average keys of a group's parameters; none if the group is not averaged."""
        return [ema_key(d) for d in self.ema_decays] if group["ema"] else []

    def moments(self, group: dict[str, Any]) -> list[str]:
        """The keys of a group's moments, which begin at zero."""
        return ["exp_avg", "exp_avg_sq"]

    def locate(self, places: Mapping[nn.Parameter, Place]) -> None:
        """Be told where this rank's pieces of parameters lie in those it steps, which AdamW need not know."""

    @torch.no_grad()
    def init_state(self, param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """Make a parameter's state if it has none: zero moments, averages equal to the weights."""
        state = self.state[param]
        if not state:
            for key in self.moments(group):
                state[key] = torch.zeros_like(param)
            for key in self.ema_keys(group):
                state[key] = param.detach().clone()
        return state

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every parameter that has a gradient, unless the gradient norm is not finite."""
        if closure is not None:
            raise ValueError("AdamWEMA.step takes no closure: compute the loss and its gradients before the step")
        norm = self._local_norm() if self.grad_norm is None else self.grad_norm()
        now = Now(self.counters[APPLIED] + 1, ~self._finite(norm), self._clip_scale(norm))
        for group in self.param_groups:
            self.update(group, [param for param in group["params"] if param.grad is not None], now)
        if self.grad_norm is None:
            self.norm = norm
            self.end_step(norm)

    def update(self, group: dict[str, Any], params: list[Tensor], now: Now) -> None:
        """The step of those of a group's parameters that have gradients."""
        beta1, beta2 = group["betas"]
        states = [self.state[param] or self.init_state(param, group) for param in params]
        keys = self.ema_keys(group)
        adamw_ema_foreach(
            params, [param.grad for param in params], [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states], [[s[key] for s in states] for key in keys],
            lr=group["lr"], beta1=beta1, beta2=beta2, eps=group["eps"], weight_decay=group["weight_decay"],
            step=now.step, skip=now.skip, ema_decays=self.decays(now.step)[: len(keys)], grad_scale=now.grad_scale,
            bf16_outs=[self.copies.get(param) for param in params],
        )  # fmt: skip

    @torch.no_grad()
    def end_step(self, norm: Tensor | float) -> None:
        """Count the step that has just been made, by the global gradient norm it was made with."""
        finite = self._finite(norm).to(torch.int64)
        self.counters[APPLIED] += finite
        self.counters[SKIPPED] += 1 - finite
        self.counters[SKIPPED_IN_A_ROW] = (self.counters[SKIPPED_IN_A_ROW] + 1) * (1 - finite)

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of the next step: that of every group, multiplied by its `lr_factor`, if it has one."""
        for group in self.param_groups:
            group["lr"] = lr * group.get("lr_factor", 1.0)

    def scalars(self) -> dict[str, int]:
        """The counters as plain numbers, for a checkpoint. Waits for the device."""
        return dict(zip(COUNTERS, self.counters.tolist(), strict=True))

    def load_scalars(self, scalars: dict[str, int]) -> None:
        """Set the counters from what `scalars` gave."""
        self.counters.copy_(torch.tensor([scalars[name] for name in COUNTERS]))

    def decays(self, step: Tensor) -> list[float | Tensor]:
        """Those of the averages in a step."""
        if not self.ema_warmup:
            return list(self.ema_decays)
        warm = (1.0 + step.to(torch.float64)) / (10.0 + step)
        return [warm.clamp(max=decay) for decay in self.ema_decays]

    def _clip_scale(self, norm: Tensor | float) -> float | Tensor:
        """What the gradient is multiplied with, so that its norm is at most clip_norm."""
        if self.clip_norm is None:
            return 1.0
        return (self.clip_norm / (torch.as_tensor(norm, device=self.counters.device) + 1e-6)).clamp(max=1.0)

    def _finite(self, norm: Tensor | float) -> Tensor:
        return torch.isfinite(torch.as_tensor(norm, device=self.counters.device))

    def _local_norm(self) -> Tensor:
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        return total_norm(grads)


def _check_group(number: int, group: dict[str, Any]) -> None:
    beta1, beta2 = group["betas"]
    if not (0.0 <= beta1 < 1.0 and 0.0 <= beta2 < 1.0):
        raise ValueError(f"param group {number}: betas must be in [0, 1), got {group['betas']}")
    for key in ("lr", "eps", "weight_decay"):
        if group[key] < 0.0:
            raise ValueError(f"param group {number}: {key} must not be negative, got {group[key]}")
