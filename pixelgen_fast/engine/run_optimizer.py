"""The optimizer of a run, from its settings and what it trains."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from pixelgen_fast.engine.muon import Muon
from pixelgen_fast.engine.optimizer import AdamWEMA
from pixelgen_fast.models.system import BaseSystem
from pixelgen_fast.optimizer import Optimizer
from pixelgen_fast.settings import ConfigError

EVEN = 8  # bf16 numbers in 16 bytes


def run_optimizer(settings: Optimizer, model: BaseSystem, alignment: nn.Module | None) -> AdamWEMA:
    """Over what the model trains, and over the projector of its alignment, not averaged.

    Muon has the matrices that the model names, AdamW the rest. Raises ConfigError for Muon where there are none.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    projector = [] if alignment is None else list(alignment.parameters())
    by_muon = _muon_groups(settings, model)
    taken = {p for group in by_muon for p in group["params"]}
    groups = [*by_muon, {"params": _even_first(p for p in trained if p not in taken)}]
    if projector:
        groups.append({"params": projector, "ema": False})
    kind = Muon if by_muon else AdamWEMA
    return kind(
        groups,
        lr=settings.lr,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        ema_decays=settings.ema,
        ema_warmup=settings.ema_warmup,
        clip_norm=settings.clip,
    )


def _muon_groups(settings: Optimizer, model: BaseSystem) -> list[dict[str, Any]]:
    if settings.name != "muon":
        return []
    stacked, muon = model.matrices(), settings.muon
    if not stacked:
        raise ConfigError(f"optimizer.name is muon, but {model.system} has no matrices for it; use adamw")
    factor = 1.0 if muon.lr is None else muon.lr / settings.lr
    matrices = _even_first(stacked)
    own = {"lr": factor * settings.lr, "lr_factor": factor}
    own |= {"momentum": muon.momentum, "scale": muon.scale, "steps": muon.steps}
    return [{"params": matrices, "stacked": {p: stacked[p] for p in matrices}, **own}]


def _even_first(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Parameters of odd sizes last.

    ZeRO cuts all from one buffer, in this order, and behind one of them no other would begin at a multiple of 16 bytes,
    which matrix products and our kernels are fastest with.
    """
    return sorted(parameters, key=lambda p: p.numel() % EVEN != 0)
