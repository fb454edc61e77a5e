"""The configuration of a teacher's training, read and checked like that of a generator (pixelgen_fast/config.py)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pixelgen_fast.config import ConfigError, explain, read_layers

REPORT = "report.json"  # in run.dir, what the teacher's judge found


@dataclass
class Run:
    # where metrics, curves and, at the end, the folder "teacher" go
    dir: str = "runs/teacher"
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"


@dataclass
class Data:
    # as data.root of a generator; every image has image_size pixels a side and stays in memory
    root: str = "digits"
    image_size: int = 16
    # share of every class that is kept from training and judged; of the digits, 0.5 is the half that `evaluate` judges
    held_out: float = 0.5


@dataclass
class Network:
    """A DINOv3 of timm: one class token, four registers, rotary positions, LayerScale that begins at layer_scale."""

    embed_dim: int = 96
    depth: int = 4
    num_heads: int = 4
    patch_size: int = 4
    layer_scale: float = 1.0


@dataclass
class Views:
    """How an image is distorted; see views.py. Two large views keep image_size, the small ones have small_size."""

    small: int = 2
    small_size: int = 8
    # share of the image's area that a view shows; above 1 it shows a margin too, which is black
    large_area: tuple[float, float] = (0.5, 1.2)
    small_area: tuple[float, float] = (0.5, 0.9)
    # greatest angle in degrees, log of the greatest ratio of the sides, and standard deviation of an elastic warp
    rotation: float = 15.0
    aspect: float = 0.3
    warp: float = 0.05
    flip: bool = False
    # greatest relative change of brightness, and standard deviation of the noise that is added to intensities in [0, 1]
    brightness: float = 0.2
    noise: float = 0.03
    # this share of the large views has patches masked, each a share of its patches between the two
    masked: float = 0.7
    mask_share: tuple[float, float] = (0.3, 0.7)


@dataclass
class Objective:
    prototypes: int = 1024
    head_hidden: int = 256
    head_width: int = 64
    student_temperature: float = 0.1
    teacher_temperature: float = 0.02
    # of the masked patches' loss and of the loss that keeps the class tokens of a batch apart (KoLeo)
    patch_weight: float = 1.0
    spread_weight: float = 0.2
    # of the moving average: rises from this to 1 along half a cosine
    momentum: float = 0.9


@dataclass
class Optimizer:
    lr: float = 1e-3
    warmup_images: int = 0
    weight_decay: float = 0.3
    clip: float = 3.0


@dataclass
class Train:
    images: int = 32_000
    batch: int = 32


@dataclass
class Log:
    every_images: int = 640
    # how often, in images, and with how many neighbours the teacher is judged
    judge_every_images: int = 3_200
    neighbours: int = 20


@dataclass
class TeacherConfig:
    run: Run = field(default_factory=Run)
    data: Data = field(default_factory=Data)
    network: Network = field(default_factory=Network)
    views: Views = field(default_factory=Views)
    objective: Objective = field(default_factory=Objective)
    optimizer: Optimizer = field(default_factory=Optimizer)
    train: Train = field(default_factory=Train)
    log: Log = field(default_factory=Log)


def load(path: str | Path, overrides: Iterable[str]) -> TeacherConfig:
    """Read a YAML file, apply overrides such as `optimizer.lr=2e-3`, check everything.

    Raises ConfigError for a missing or malformed file, an unknown key, a wrong type or a value that cannot work.
    """
    merged = OmegaConf.structured(TeacherConfig)
    for origin, values in read_layers(path, overrides):
        try:
            merged = OmegaConf.merge(merged, values)
        except OmegaConfBaseException as error:
            raise ConfigError(f"{origin}: {explain(error, TeacherConfig)}") from error
    config: TeacherConfig = OmegaConf.to_object(merged)
    validate(config)
    return config


def validate(config: TeacherConfig) -> None:
    """Raise ConfigError, naming keys and values, for what cannot work."""
    d, n, v, o, p = config.data, config.network, config.views, config.objective, config.optimizer
    positive = {
        "data.image_size": d.image_size,
        "network.embed_dim": n.embed_dim,
        "network.depth": n.depth,
        "network.num_heads": n.num_heads,
        "network.patch_size": n.patch_size,
        "network.layer_scale": n.layer_scale,
        "views.small_size": v.small_size,
        "objective.prototypes": o.prototypes,
        "objective.head_hidden": o.head_hidden,
        "objective.head_width": o.head_width,
        "objective.student_temperature": o.student_temperature,
        "objective.teacher_temperature": o.teacher_temperature,
        "optimizer.lr": p.lr,
        "optimizer.clip": p.clip,
        "train.images": config.train.images,
        "log.every_images": config.log.every_images,
        "log.judge_every_images": config.log.judge_every_images,
        "log.neighbours": config.log.neighbours,
    }
    for key, value in positive.items():
        if not value > 0:
            raise ConfigError(f"{key} is {value}; it must be above 0")
    not_negative = {
        "views.small": v.small,
        "views.rotation": v.rotation,
        "views.aspect": v.aspect,
        "views.warp": v.warp,
        "views.brightness": v.brightness,
        "views.noise": v.noise,
        "objective.patch_weight": o.patch_weight,
        "objective.spread_weight": o.spread_weight,
        "optimizer.warmup_images": p.warmup_images,
        "optimizer.weight_decay": p.weight_decay,
    }
    for key, value in not_negative.items():
        if value < 0:
            raise ConfigError(f"{key} is {value}; it must not be negative")
    shares = {"data.held_out": d.held_out, "objective.momentum": o.momentum}
    for key, value in shares.items():
        if not 0 < value < 1:
            raise ConfigError(f"{key} is {value}; it must lie between 0 and 1")
    if not 0 < v.masked <= 1:
        raise ConfigError(f"views.masked is {v.masked}; it is a share, above 0 and at most 1")
    for key, (low, high), most in (
        ("views.large_area", v.large_area, 4.0),
        ("views.small_area", v.small_area, 4.0),
        ("views.mask_share", v.mask_share, 1.0),
    ):
        if not 0 < low <= high <= most:
            raise ConfigError(f"{key} is [{low}, {high}]; it must rise, above 0 and not beyond {most:g}")
    for key, size in (("data.image_size", d.image_size), ("views.small_size", v.small_size)):
        if size % n.patch_size:
            raise ConfigError(f"{key} {size} is not a multiple of network.patch_size {n.patch_size}")
    if n.embed_dim % (4 * n.num_heads):
        raise ConfigError(
            f"network.embed_dim {n.embed_dim} is not a multiple of 4 x network.num_heads {n.num_heads}, which rotary "
            "positions in two dimensions need"
        )
    if config.train.batch < 2:
        raise ConfigError(f"train.batch is {config.train.batch}; views are told apart within a batch, give at least 2")
    if round(v.masked * 2 * config.train.batch) < 2:
        raise ConfigError(
            f"views.masked {v.masked} of 2 x train.batch {config.train.batch} views are fewer than two; raise one"
        )
    if p.warmup_images >= config.train.images:
        raise ConfigError(f"optimizer.warmup_images {p.warmup_images} is not below train.images {config.train.images}")
