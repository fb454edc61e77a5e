"""The settings of the optimizer: the section `optimizer` of a configuration, and what cannot be together in it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pixelgen_fast.settings import ConfigError, MuonScale, above, at_least, within


@dataclass
class Drop:
    at_images: int
    lr: float


@dataclass
class Muon:
    """What trains the matrices that the system names, at optimizer.name muon; AdamW trains the rest."""

    # null: optimizer.lr. The schedule multiplies both by the same
    lr: float | None = above(0, default=None)
    momentum: float = within(0, 1, open_high=True, default=0.95)
    # what an orthogonalised update is multiplied by: 0.2 sqrt(max(rows, columns)), as large as AdamW's, or
    # sqrt(max(1, rows / columns)), which wants a rate some ten times as high
    scale: MuonScale = "match_rms_adamw"
    # of the Newton-Schulz iteration
    steps: int = within(1, 20, default=5)


@dataclass
class Optimizer:
    name: Literal["adamw", "muon"] = "adamw"
    lr: float = above(0, default=1e-4)
    betas: tuple[float, float] = within(0, 1, open_high=True, default=(0.9, 0.999))
    eps: float = above(0, default=1e-8)
    weight_decay: float = at_least(0, default=0.0)
    muon: Muon = field(default_factory=Muon)
    # largest global gradient norm; None: no clipping
    clip: float | None = above(0, default=1.0)
    # decays of the averages that are kept, between 0 and 1; the first is the one that is drawn, judged and exported
    ema: list[float] = field(default_factory=lambda: [0.9999])
    # min(decay, (1 + s) / (10 + s)) after s steps, for short runs
    ema_warmup: bool = False
    warmup_images: int = at_least(0, default=0)
    # stepped: the rate of the last of `drops`; linear: straight from each of them to the next, then constant
    schedule: Literal["constant", "cosine", "stepped", "linear"] = "constant"
    drops: list[Drop] = field(default_factory=list)

    @property
    def stages(self) -> tuple[int, ...]:
        """The stages of ZeRO that it goes with."""
        return (1, 2) if self.name == "muon" else (1, 2, 3)


def check_optimizer(p: Optimizer, images: int, zero_stage: int) -> None:
    """Raise ConfigError, naming keys and values, for what cannot be together. images: of the run."""
    if len(set(p.ema)) != len(p.ema) or not p.ema or not all(0 < decay < 1 for decay in p.ema):
        raise ConfigError(f"optimizer.ema is {p.ema}; give one or more different decays between 0 and 1")
    _check_schedule(p, images)
    if p.name != "muon" and p.muon != Muon():
        raise ConfigError(f"optimizer.muon is given, but optimizer.name is {p.name}; set it to muon")
    if zero_stage not in p.stages:
        raise ConfigError(
            "optimizer.name muon does not go with train.zero_stage 3: it needs whole matrices, and there each of them "
            "is cut over all ranks and would be gathered in every step; use stage 1 or 2, which cut hardly any"
        )


def _check_schedule(p: Optimizer, images: int) -> None:
    uses_drops = p.schedule in ("stepped", "linear")
    if p.drops and not uses_drops:
        raise ConfigError(f"optimizer.drops goes with optimizer.schedule stepped or linear, and it is {p.schedule}")
    if uses_drops and not p.drops:
        raise ConfigError(f"optimizer.schedule is {p.schedule}; give optimizer.drops: [{{at_images: N, lr: X}}, ...]")
    if [drop.at_images for drop in p.drops] != sorted({drop.at_images for drop in p.drops}):
        raise ConfigError(f"optimizer.drops at {[drop.at_images for drop in p.drops]} images; they must increase")
    if p.warmup_images >= images:
        raise ConfigError(f"optimizer.warmup_images {p.warmup_images} is not below train.images {images}")
