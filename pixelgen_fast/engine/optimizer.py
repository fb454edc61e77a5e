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

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from pixelgen_kernels.adamw_ema import adamw_ema_foreach, total_norm
from torch import Tensor, nn

from pixelgen_fast.config import Optimizer
from pixelgen_fast.runs.checkpoint import ema_key

APPLIED, SKIPPED, SKIPPED_IN_A_ROW = range(3)
COUNTERS = ("step", "skipped", "skipped_in_a_row")
EVEN = 8  # bf16 numbers in 16 bytes


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

    @torch.no_grad()
    def init_state(self, param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """Make a parameter's state if it has none: zero moments, averages equal to the weights."""
        state = self.state[param]
        if not state:
            state["exp_avg"] = torch.zeros_like(param)
            state["exp_avg_sq"] = torch.zeros_like(param)
            for key in self.ema_keys(group):
                state[key] = param.detach().clone()
        return state

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every parameter that has a gradient, unless the gradient norm is not finite."""
        if closure is not None:
            raise ValueError("AdamWEMA.step takes no closure: compute the loss and its gradients before the step")
        norm = self._local_norm() if self.grad_norm is None else self.grad_norm()
        skip = ~self._finite(norm)
        step = self.counters[APPLIED] + 1
        decays = self._decays(step)
        scale = self._clip_scale(norm)
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            params = [param for param in group["params"] if param.grad is not None]
            states = [self.init_state(param, group) for param in params]
            keys = self.ema_keys(group)
            adamw_ema_foreach(
                params, [param.grad for param in params], [s["exp_avg"] for s in states],
                [s["exp_avg_sq"] for s in states], [[s[key] for s in states] for key in keys],
                lr=group["lr"], beta1=beta1, beta2=beta2, eps=group["eps"], weight_decay=group["weight_decay"],
                step=step, skip=skip, ema_decays=decays[: len(keys)], grad_scale=scale,
                bf16_outs=[self.copies.get(param) for param in params],
            )  # fmt: skip
        if self.grad_norm is None:
            self.norm = norm
            self.end_step(norm)

    @torch.no_grad()
    def end_step(self, norm: Tensor | float) -> None:
        """Count the step that has just been made, by the global gradient norm it was made with."""
        finite = self._finite(norm).to(torch.int64)
        self.counters[APPLIED] += finite
        self.counters[SKIPPED] += 1 - finite
        self.counters[SKIPPED_IN_A_ROW] = (self.counters[SKIPPED_IN_A_ROW] + 1) * (1 - finite)

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of every group for the next step."""
        for group in self.param_groups:
            group["lr"] = lr

    def scalars(self) -> dict[str, int]:
        """The counters as plain numbers, for a checkpoint. Waits for the device."""
        return dict(zip(COUNTERS, self.counters.tolist(), strict=True))

    def load_scalars(self, scalars: dict[str, int]) -> None:
        """Set the counters from what `scalars` gave."""
        self.counters.copy_(torch.tensor([scalars[name] for name in COUNTERS]))

    def _decays(self, step: Tensor) -> list[float | Tensor]:
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


def run_optimizer(settings: Optimizer, model: nn.Module, alignment: nn.Module | None) -> AdamWEMA:
    """The optimizer of a run: over what the model trains, and over the projector of its alignment, not averaged.

    Parameters of odd sizes come last: ZeRO cuts all from one buffer, in this order, and behind one of them no other
    would begin at a multiple of 16 bytes, which matrix products and our kernels are fastest with.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": sorted(trained, key=lambda p: p.numel() % EVEN != 0)}]
    projector = [] if alignment is None else list(alignment.parameters())
    if projector:
        groups.append({"params": projector, "ema": False})
    return AdamWEMA(
        groups,
        lr=settings.lr,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        ema_decays=settings.ema,
        ema_warmup=settings.ema_warmup,
        clip_norm=settings.clip,
    )


def _check_group(number: int, group: dict[str, Any]) -> None:
    beta1, beta2 = group["betas"]
    if not (0.0 <= beta1 < 1.0 and 0.0 <= beta2 < 1.0):
        raise ValueError(f"param group {number}: betas must be in [0, 1), got {group['betas']}")
    for key in ("lr", "eps", "weight_decay"):
        if group[key] < 0.0:
            raise ValueError(f"param group {number}: {key} must not be negative, got {group[key]}")
