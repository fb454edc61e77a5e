"""The configuration of a decoder's training and of latent statistics, read and checked like that of a generator."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pixelgen_fast import config as cfg
from pixelgen_fast.overrides import merge, read_layers
from pixelgen_fast.rae.decoder import DecoderSettings
from pixelgen_fast.settings import ConfigError, above, at_least, check_ranges, origin_named, within
from pixelgen_fast.validation import Validation

# in run.dir: the statistics, the folder of the trained decoder, and the copy of the encoder
LATENTS, DECODER, ENCODER = "latents.safetensors", "decoder", "encoder"


@dataclass
class Run(cfg.Run):
    dir: str = "runs/decoder"
    # a decoder's folder or a published decoder to start a new run from
    init: str | None = None


@dataclass
class Data(cfg.Data):
    # training images are cropped to this many pixels as `crop` says, and image_size of them are cut out at random;
    # null: image_size, and nothing is cut out
    resize: int | None = above(0, default=None, most=16_384)


@dataclass
class Encoder:
    """The frozen encoder; see rae/encoder.py. It sees image_size / decoder.patch_size patches a side."""

    # a vision transformer of timm; vit_base_patch16_224.mae, vit_base_patch16_siglip_256.v2_webli, ...
    network: str = "vit_base_patch14_reg4_dinov2.lvd142m"
    # a file in timm's, Meta's or Hugging Face's names, a folder that holds a teacher, or "random"; null: from the hub
    weights: str | None = None
    # blocks, counted from 0, whose mean is the latent, as RAEv2 has it; none: the last block alone
    layers: list[int] = field(default_factory=list)


@dataclass
class Discriminator:
    """Heads on a frozen DINO; see rae/discriminator.py."""

    network: str = "vit_small_patch8_224.dino"
    # as encoder.weights
    weights: str | None = None
    # blocks, counted from 0, that the heads read; none: four, evenly spread
    taps: list[int] = field(default_factory=list)
    lr: float = above(0, default=2e-4)
    # DiffAug of what it sees: translation by an eighth of the side, and colour
    augment: bool = True


@dataclass
class Objective:
    # tau: training latents get noise of a deviation drawn from [0, tau] for each image
    latent_noise: float = at_least(0, default=0.8)
    # of LPIPS beside the mean absolute error; 0: none
    perceptual_weight: float = at_least(0, default=1.0)
    # VGG-16 of LPIPS: a file of torchvision's weights, or "random"; null: from the hub
    vgg: str | None = None
    # of the adversarial loss, which is scaled to the reconstruction's besides; 0: no discriminator
    gan_weight: float = at_least(0, default=0.75)
    # images from which on the discriminator learns, and from which on the decoder hears of it
    discriminator_from: int = at_least(0, default=7_687_002)
    gan_from: int = at_least(0, default=10_249_336)


@dataclass
class Optimizer:
    """AdamW of the decoder; the discriminator has the same settings but for its rate."""

    lr: float = above(0, default=2e-4)
    betas: tuple[float, float] = within(0, 1, open_high=True, default=(0.9, 0.95))
    eps: float = above(0, default=1e-8)
    weight_decay: float = at_least(0, default=0.0)
    # largest global gradient norm; null: no clipping
    clip: float | None = above(0, default=None)
    # decays of the averages of the decoder; the first is the one that is judged and kept
    ema: list[float] = field(default_factory=lambda: [0.9978])
    # the rate rises over these images, then falls along half a cosine to this share of itself
    warmup_images: int = at_least(0, default=1_281_167)
    last_share: float = within(0, 1, default=0.1)


@dataclass
class Train:
    images: int = above(0, default=20_498_672)
    # images of one step over all ranks, and of one forward pass on one rank
    global_batch: int = above(0, default=512, most=1_000_000)
    micro_batch: int = above(0, default=32, most=1_000_000)
    # auto: bf16 on a GPU, fp32 on a CPU; weights are float32 in both
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    # as in the training of a generator
    loss_range: float | None = above(1, default=10.0)
    max_bad_steps: int = above(0, default=10)
    returns: int = at_least(0, default=0)
    return_lr: float = within(0, 1, open_low=True, default=0.5)


@dataclass
class Sample:
    # a grid of images and what the average of the weights makes of them: how often (0: never), and how many
    grid_every_images: int = at_least(0, default=1_281_167)
    grid_images: int = within(1, 64, default=16)


@dataclass
class Latents:
    """Of `pixelgen latents`."""

    # null: latents.safetensors in run.dir
    out: str | None = None
    batch: int = above(0, default=64, most=65_536)
    # how often, in images, what was summed so far is written, for the same command to go on from
    save_every_images: int = above(0, default=65_536)


@dataclass
class DecoderConfig:
    run: Run = field(default_factory=Run)
    data: Data = field(default_factory=Data)
    encoder: Encoder = field(default_factory=Encoder)
    decoder: DecoderSettings = field(default_factory=DecoderSettings)
    discriminator: Discriminator = field(default_factory=Discriminator)
    objective: Objective = field(default_factory=Objective)
    optimizer: Optimizer = field(default_factory=Optimizer)
    train: Train = field(default_factory=Train)
    save: cfg.Save = field(default_factory=cfg.Save)
    log: cfg.Log = field(default_factory=cfg.Log)
    sample: Sample = field(default_factory=Sample)
    latents: Latents = field(default_factory=Latents)

    @property
    def grid(self) -> int:
        """Latents a side."""
        return self.data.image_size // self.decoder.patch_size


def load(path: str | Path, overrides: Iterable[str]) -> DecoderConfig:
    """Read a YAML file, apply overrides such as `optimizer.lr=1e-4`, check everything.

    Raises ConfigError for a missing or malformed file, an unknown key, a wrong type or a value that cannot work.
    """
    config: DecoderConfig = merge(DecoderConfig, read_layers(path, overrides))
    with origin_named(str(path)):
        validate(config)
    return config


def from_dict(values: dict[str, Any]) -> DecoderConfig:
    """Rebuild a configuration that a checkpoint holds. Raises ConfigError as `load` does."""
    config: DecoderConfig = merge(DecoderConfig, [("saved configuration", values)])
    with origin_named("saved configuration"):
        validate(config)
    return config


def validate(config: DecoderConfig) -> None:
    """Raise ConfigError, naming keys and values, for what cannot work."""
    check_ranges(config)
    d, p, o, t = config.data, config.decoder, config.objective, config.train
    if d.image_size % p.patch_size:
        raise ConfigError(f"data.image_size {d.image_size} is not a multiple of decoder.patch_size {p.patch_size}")
    if p.hidden_size % p.num_heads or p.hidden_size % 4:
        raise ConfigError(
            f"decoder.hidden_size {p.hidden_size} must be a multiple of decoder.num_heads {p.num_heads}, and of 4 for "
            "its positions"
        )
    if d.validation != Validation():
        raise ConfigError("data.validation is of generators, and a decoder has no use for it; leave it out")
    if d.resize is not None and d.resize < d.image_size:
        raise ConfigError(f"data.resize {d.resize} is smaller than data.image_size {d.image_size}")
    if o.gan_weight and o.gan_from < o.discriminator_from:
        raise ConfigError(
            f"objective.gan_from {o.gan_from} comes before objective.discriminator_from {o.discriminator_from}: the "
            "decoder would hear of a discriminator that has learned nothing"
        )
    ema = config.optimizer.ema
    if len(set(ema)) != len(ema) or not ema or not all(0 < decay < 1 for decay in ema):
        raise ConfigError(f"optimizer.ema is {ema}; give one or more different decays between 0 and 1")
    if config.optimizer.warmup_images >= t.images:
        raise ConfigError(
            f"optimizer.warmup_images {config.optimizer.warmup_images} is not below train.images {t.images}"
        )
    if t.global_batch % t.micro_batch:
        raise ConfigError(
            f"train.micro_batch {t.micro_batch} does not divide train.global_batch {t.global_batch}; change one of them"
        )
