"""The configuration of a teacher's training, read and checked like that of a generator (pixelgen_fast/config.py)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from pixelgen_fast.overrides import merge, read_layers
from pixelgen_fast.settings import ConfigError, Device, above, at_least, check_ranges, origin_named, within

REPORT = "report.json"  # in run.dir, what the teacher's judge found


@dataclass
class Run:
    # where metrics, curves and, at the end, the folder "teacher" go
    dir: str = "runs/teacher"
    seed: int = 0
    device: Device = "auto"


@dataclass
class Data:
    # as data.root of a generator; every image has image_size pixels a side and stays in memory
    root: str = "digits"
    image_size: int = above(0, default=16, most=16_384)
    # share of every class that is kept from training and judged; of the digits, 0.5 is the half that `evaluate` judges
    held_out: float = within(0, 1, open_low=True, open_high=True, default=0.5)


@dataclass
class Network:
    """A DINOv3 of timm: one class token, four registers, rotary positions, LayerScale that begins at layer_scale."""

    embed_dim: int = above(0, default=96, most=65_536)
    depth: int = above(0, default=4, most=1000)
    num_heads: int = above(0, default=4, most=65_536)
    patch_size: int = above(0, default=4, most=16_384)
    layer_scale: float = above(0, default=1.0)


@dataclass
class Views:
    """How an image is distorted; see views.py. Two large views keep image_size, the small ones have small_size."""

    small: int = at_least(0, default=2, most=1000)
    small_size: int = above(0, default=8, most=16_384)
    # share of the image's area that a view shows; above 1 it shows a margin too, which is black
    large_area: tuple[float, float] = within(0, 4, open_low=True, default=(0.5, 1.2))
    small_area: tuple[float, float] = within(0, 4, open_low=True, default=(0.5, 0.9))
    # greatest angle in degrees, log of the greatest ratio of the sides, and standard deviation of an elastic warp
    rotation: float = at_least(0, default=15.0)
    aspect: float = at_least(0, default=0.3)
    warp: float = at_least(0, default=0.05)
    flip: bool = False
    # greatest relative change of brightness, and standard deviation of the noise that is added to intensities in [0, 1]
    brightness: float = at_least(0, default=0.2)
    noise: float = at_least(0, default=0.03)
    # this share of the large views has patches masked, each a share of its patches between the two
    masked: float = within(0, 1, open_low=True, default=0.7)
    mask_share: tuple[float, float] = within(0, 1, open_low=True, default=(0.3, 0.7))


@dataclass
class Objective:
    prototypes: int = above(0, default=1024, most=10_000_000)
    head_hidden: int = above(0, default=256, most=65_536)
    head_width: int = above(0, default=64, most=65_536)
    student_temperature: float = above(0, default=0.1)
    teacher_temperature: float = above(0, default=0.02)
    # of the masked patches' loss and of the loss that keeps the class tokens of a batch apart (KoLeo)
    patch_weight: float = at_least(0, default=1.0)
    spread_weight: float = at_least(0, default=0.2)
    # of the moving average: rises from this to 1 along half a cosine
    momentum: float = within(0, 1, open_low=True, open_high=True, default=0.9)


@dataclass
class Optimizer:
    lr: float = above(0, default=1e-3)
    warmup_images: int = at_least(0, default=0)
    weight_decay: float = at_least(0, default=0.3)
    clip: float = above(0, default=3.0)


@dataclass
class Train:
    images: int = above(0, default=32_000)
    # views are told apart within a batch
    batch: int = at_least(2, default=32, most=1_000_000)


@dataclass
class Log:
    every_images: int = above(0, default=640)
    # how often, in images, and with how many neighbours the teacher is judged
    judge_every_images: int = above(0, default=3_200)
    neighbours: int = above(0, default=20, most=1_000_000)


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
    config: TeacherConfig = merge(TeacherConfig, read_layers(path, overrides))
    with origin_named(str(path)):
        validate(config)
    return config


def validate(config: TeacherConfig) -> None:
    """Raise ConfigError, naming keys and values, for what cannot work."""
    check_ranges(config)
    d, n, v, p = config.data, config.network, config.views, config.optimizer
    for key, (low, high) in (
        ("views.large_area", v.large_area),
        ("views.small_area", v.small_area),
        ("views.mask_share", v.mask_share),
    ):
        if low > high:
            raise ConfigError(f"{key} is [{low}, {high}]; it must rise")
    for key, size in (("data.image_size", d.image_size), ("views.small_size", v.small_size)):
        if size % n.patch_size:
            raise ConfigError(f"{key} {size} is not a multiple of network.patch_size {n.patch_size}")
    if n.embed_dim % (4 * n.num_heads):
        raise ConfigError(
            f"network.embed_dim {n.embed_dim} is not a multiple of 4 x network.num_heads {n.num_heads}, which rotary "
            "positions in two dimensions need"
        )
    if round(v.masked * 2 * config.train.batch) < 2:
        raise ConfigError(
            f"views.masked {v.masked} of 2 x train.batch {config.train.batch} views are fewer than two; raise one"
        )
    if p.warmup_images >= config.train.images:
        raise ConfigError(f"optimizer.warmup_images {p.warmup_images} is not below train.images {config.train.images}")
