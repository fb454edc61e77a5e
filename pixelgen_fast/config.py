"""The configuration of a run: a tree of dataclasses, values from YAML, dotted overrides on top.

An unknown key, a wrong type or an impossible combination is a ConfigError before anything starts. Progress is counted
in images everywhere (`*_images`); steps appear in logs only. `model` is checked against the dataclass of its system.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pixelgen_fast.optimizer import Optimizer, check_optimizer
from pixelgen_fast.overrides import Override, explain, merge, override_layers, read_layers
from pixelgen_fast.settings import (
    SEEDS,
    ConfigError,
    Crop,
    Device,
    PathKind,
    Prediction,
    Recompute,
    Solver,
    TimeKind,
    above,
    at_least,
    check_ranges,
    origin_named,
    within,
)
from pixelgen_fast.validation import Validation


@dataclass
class Run:
    # where checkpoints, metrics and pictures go; the same folder again resumes
    dir: str = "runs/run"
    seed: int = within(*SEEDS, default=0)
    device: Device = "auto"
    # a run folder or checkpoint to resume from instead of run.dir; one that holds nothing is an error
    resume: str | None = None
    # weights to start a new run from: a folder of `pixelgen export` or `pixelgen import`, or hub:OWNER/NAME
    init: str | None = None
    # of several ranks: seconds without a sign of life after which one is lost, and in which the slowest part of a run
    # ends; a run whose rank is lost, or that is stuck, ends with a line that names the rank
    rank_limit: float = above(0, default=60.0)
    stuck_limit: float = above(0, default=1800.0)


@dataclass
class Data:
    # a class-per-folder tree, a tar or folder of tars (CLASS/NAME.ext, or WebDataset's pairs of an image and its .cls),
    # a Parquet file or folder of them (columns image and label), a folder written by `pixelgen data pack`, or "digits"
    root: str = "digits"
    image_size: int = above(0, default=256, most=16_384)
    # None: the number of classes that root has
    num_classes: int | None = at_least(1, default=None, most=10_000_000)
    # classes in equal shares instead of images: those of small classes come more often, those of large ones less
    class_balanced: bool = False
    flip: bool = False
    # adm: halve, bicubic, centre crop as published for ImageNet; none: images have the right size already
    crop: Crop = "adm"
    # reader processes and decoder threads of each rank; 0 workers: read in the training process
    workers: int = at_least(0, default=2, most=1024)
    threads: int = above(0, default=2, most=1024)
    prefetch: int = above(0, default=2, most=1024)
    # how long a data root that is away, as a network file system that reconnects, is waited for
    wait_seconds: float = at_least(0, default=60.0)
    # a run ends when a rank has met more than this share of the images, and more than 10, that are unreadable
    max_unreadable: float = within(0, 1, default=0.01)
    # share of a batch that the JPEG engines of a GPU decode
    hw_decoder_load: float = within(0, 1, default=0.65)
    validation: Validation = field(default_factory=Validation)


@dataclass
class Objective:
    predict: Prediction = "v"
    loss: Prediction = "v"
    time: TimeKind = "logit_normal"
    time_mean: float = 0.0
    time_std: float = above(0, default=1.0)
    # times are drawn given that t, before the shift, is not below this
    time_min: float = within(0, 1, open_high=True, default=0.0)
    # t / (t + (1 - t) shift): above 1 spends more of the training near the noise
    time_shift: float = above(0, default=1.0)
    noise_scale: float = above(0, default=1.0)
    # how often a label is dropped, for guidance
    class_drop: float = within(0, 1, open_high=True, default=0.1)
    # smallest 1 - t (or t) that a conversion between predictions divides by
    t_eps: float = within(0, 1, open_low=True, open_high=True, default=0.05)
    # DeCo's loss on block frequencies of the velocity, added with this weight; its JPEG quality, 1 to 100
    frequency_weight: float = at_least(0, default=0.0)
    frequency_quality: int = within(1, 100, default=85)
    # energy_guided: data come out of a blur of at most sigma0 pixels, between the two times of release
    path: PathKind = "linear"
    sigma0: float = above(0, default=3.5, most=1000)
    release: tuple[float, float] = within(0, 1, default=(0.0, 1.0))


@dataclass
class Alignment:
    """REPA: draw the generator's patch tokens towards those that a frozen teacher gives of the clean image."""

    # a timm model such as vit_base_patch14_dinov2.lvd142m; null: no alignment
    teacher: str | None = None
    # a file in timm's, Meta's or Hugging Face's names, a folder that holds a teacher, or "random"; null: from the hub
    weights: str | None = None
    # the patch block, counted from 1, after which the generator's tokens are read; 0: a DINO student's own tokens
    layer: int = at_least(0, default=8, most=1000)
    weight: float = above(0, default=0.5)
    # the loss counts for the images of a run before this one; null: for all
    stop_images: int | None = above(0, default=None)
    # conv: a 3 x 3 convolution over the grid of tokens; none: the tokens themselves follow the teacher's, which must be
    # as wide
    projector: Literal["mlp", "conv", "none"] = "mlp"
    # of an mlp; null: as wide as the generator
    projector_hidden: int | None = above(0, default=None, most=65_536)
    # the share of their mean over an image's tokens that is taken from the teacher's features, before they are divided
    # by their deviation over the tokens; null: they stay as they are
    spatial_norm: float | None = within(0, 1, default=None)
    compile: bool = False
    # a folder to keep the teacher's features in, for data sets whose features fit on the disk
    cache: str | None = None


@dataclass
class Train:
    images: int = above(0, default=48_000_000)
    # images of one optimizer step over all ranks, and of one forward pass on one rank
    global_batch: int = above(0, default=256, most=1_000_000)
    micro_batch: int = above(0, default=64, most=1_000_000)
    zero_stage: Literal[1, 2, 3] = 1
    # auto: bf16 on a GPU, fp32 on a CPU
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    # what backward computes again instead of keeping it: nothing, all but matrix products and attention, whole blocks
    recompute: Recompute = "none"
    compile_blocks: bool = False
    # forward and backward of a step as CUDA graphs, on one GPU: for models so small that it waits for the host
    cuda_graph: bool = False
    # a step is bad whose loss or gradient is not finite, or whose loss is above this many times its running mean (null:
    # no range); a run stops after so many of them in a row, and writes no checkpoint meanwhile
    loss_range: float | None = above(1, default=10.0)
    max_bad_steps: int = above(0, default=10)
    # instead of stopping, go back to the last good checkpoint this many times, each time with the learning rate
    # multiplied by return_lr
    returns: int = at_least(0, default=0)
    return_lr: float = within(0, 1, open_low=True, default=0.5)


@dataclass
class Save:
    every_images: int = above(0, default=1_280_000)
    # the newest checkpoints; the newest that is known to be good is kept as well
    keep: int = above(0, default=2)
    # training waits for the copy to host memory only; false: until it is on disk, for hosts with little memory
    background: bool = True


@dataclass
class Log:
    every_images: int = above(0, default=12_800)
    tensorboard: bool = True
    wandb_project: str | None = None


@dataclass
class Sampling:
    """How an image is drawn; a command's options replace these settings of a run."""

    steps: int = above(0, default=100, most=100_000)
    solver: Solver = "adams2"
    # leads away from the null class, from a weaker prediction that the model has of its own, or from another model
    guidance: float = 1.0
    # a run or exported folder whose model, with the same label, guidance leads away from
    guide: str | None = None
    # guidance acts where interval[0] < t < interval[1]; None: everywhere
    interval: tuple[float, float] | None = None
    shift: float = above(0, default=1.0)
    # of sequential systems, 1 as trained: the noise of a flow or diffusion is multiplied by it, AliTok's logits are
    # divided by it, FractalGen's multiplied, so that above 1 it sharpens there: each as published
    temperature: float = at_least(0, default=1.0)
    # passes through the network in which a system that hides pieces draws an image
    passes: int = above(0, default=64, most=65_536)
    # where the flow is left, before the shift: the image is what is there
    end: float = within(0, 1, open_low=True, default=1.0)
    seed: int = within(*SEEDS, default=0)
    batch: int = above(0, default=64, most=1_000_000)


@dataclass
class Sample(Sampling):
    # the sample grid on fixed noise: how often (0: never) and how many images for each of how many classes
    grid_every_images: int = at_least(0, default=1_280_000)
    grid_classes: int = within(1, 1000, default=10)
    grid_per_class: int = within(1, 1000, default=8)


@dataclass
class Config:
    model: Any = None
    run: Run = field(default_factory=Run)
    data: Data = field(default_factory=Data)
    objective: Objective = field(default_factory=Objective)
    alignment: Alignment = field(default_factory=Alignment)
    optimizer: Optimizer = field(default_factory=Optimizer)
    train: Train = field(default_factory=Train)
    save: Save = field(default_factory=Save)
    log: Log = field(default_factory=Log)
    sample: Sample = field(default_factory=Sample)


def load(path: str | Path, overrides: Iterable[str], model_schema: Callable[[str], type]) -> Config:
    """Read a YAML file, apply overrides such as `optimizer.lr=2e-4`, check everything.

    model_schema maps `model.system` to the dataclass of that system's settings.
    Raises ConfigError for a missing or malformed file, an unknown key, a wrong type or an impossible combination.
    """
    return from_layers(read_layers(path, overrides), model_schema)


def from_dict(values: dict[str, Any], model_schema: Callable[[str], type], overrides: Iterable[str] = ()) -> Config:
    """Rebuild a configuration that `to_dict` made, overrides applied, with the same checks."""
    try:
        saved = OmegaConf.create(values)
    except OmegaConfBaseException as error:
        raise ConfigError(f"saved configuration: {explain(error, Config)}") from error
    return from_layers([("saved configuration", saved), *override_layers(overrides)], model_schema)


def from_layers(layers: list[tuple[str, Any]], model_schema: Callable[[str], type]) -> Config:
    """Merge (origin, values) layers, later over earlier, into a checked Config."""
    system, named = None, layers[0][0]
    for origin, values in layers:
        if isinstance(values, Override):
            if values.key not in ("model", "model.system"):
                continue
            values = values.values(Config)
        try:
            given = OmegaConf.select(values, "model.system")
        except OmegaConfBaseException as error:
            raise ConfigError(f"{origin}: model.system: {str(error).splitlines()[0]}") from error
        system, named = (system, named) if given is None else (given, origin)
    if system is None:
        raise ConfigError(
            f"{named}: model.system is missing, which a generator's configuration has; a decoder's is for pixelgen "
            "decoder and latents, a teacher's for teacher, a comparison's for compare"
        )
    try:
        model_class = model_schema(str(system))
    except ValueError as error:
        raise ConfigError(f"{named}: {error}") from error
    config: Config = merge(Config, layers, model_class)
    with origin_named(layers[0][0]):
        validate(config)
    return config


def to_dict(config: Config) -> dict[str, Any]:
    """Plain types only, as JSON reads them back from a checkpoint: a tuple is a list."""
    return json.loads(json.dumps(asdict(config)))


def to_yaml(config: Config) -> str:
    return OmegaConf.to_yaml(OmegaConf.create(asdict(config)))


def validate(config: Config) -> None:
    """Raise ConfigError, naming keys and values, for combinations that cannot work."""
    check_ranges(config)
    if config.model.hidden_size % config.model.num_heads:
        raise ConfigError(
            f"model.num_heads {config.model.num_heads} does not divide model.hidden_size {config.model.hidden_size}"
        )
    _check_path(config.objective)
    check_optimizer(config.optimizer, config.train.images, config.train.zero_stage)
    _check_step(config)
    _check_interval(config.sample, "sample.")
    _check_alignment(config.alignment, config.data)
    config.data.validation.check()


def _check_alignment(a: Alignment, d: Data) -> None:
    for key in ("weights", "cache", "stop_images", "spatial_norm"):
        if a.teacher is None and getattr(a, key) is not None:
            raise ConfigError(f"alignment.{key} is given, but alignment.teacher is null; name a teacher")
    if a.projector != "mlp" and a.projector_hidden is not None:
        raise ConfigError(
            f"alignment.projector_hidden is {a.projector_hidden}, but alignment.projector {a.projector} has no hidden "
            "layer; use projector=mlp, or projector_hidden=null"
        )
    if a.cache is not None and d.flip:
        raise ConfigError(
            "alignment.cache keeps one feature map of each image and data.flip shows two; set data.flip=false, or "
            "alignment.cache=null"
        )


def check_sampling(settings: Sampling, prefix: str) -> None:
    """Raise ConfigError for images that cannot be drawn. prefix: what stands before the name of a setting."""
    check_ranges(settings, prefix)
    _check_interval(settings, prefix)


def _check_interval(settings: Sampling, prefix: str) -> None:
    if settings.interval is not None and not settings.interval[0] < settings.interval[1]:
        raise ConfigError(f"{prefix}interval is {settings.interval}; the first must be below the second")


def _check_path(o: Objective) -> None:
    given = [name for name in ("sigma0", "release") if getattr(o, name) != getattr(Objective(), name)]
    if o.path == "linear" and given:
        raise ConfigError(f"objective.{given[0]} is given, but objective.path is linear; set it to energy_guided")
    if o.path == "linear":
        return
    if o.predict == "e" or o.loss != "v":
        raise ConfigError(
            f"objective.path is energy_guided with objective.predict {o.predict} and objective.loss {o.loss}; its loss "
            "is that of v, from predictions of v or x"
        )
    if not o.release[0] < o.release[1]:
        raise ConfigError(f"objective.release is {list(o.release)}; the first must be below the second")


def _check_step(config: Config) -> None:
    t = config.train
    if t.global_batch % t.micro_batch:
        raise ConfigError(
            f"train.global_batch {t.global_batch} is not a multiple of train.micro_batch {t.micro_batch}; "
            f"valid micro batches: {_divisors(t.global_batch)}"
        )
    if config.run.device == "cpu" and t.precision == "bf16":
        raise ConfigError(
            "train.precision bf16 on run.device cpu: matrix products are 6x slower than fp32 there; use fp32"
        )
    if t.recompute == "operators" and t.zero_stage == 3:
        raise ConfigError(
            "train.recompute operators gives wrong gradients with train.zero_stage 3, where weights are freed between "
            "forward and backward; use train.recompute=blocks, or stage 1 or 2"
        )
    if t.compile_blocks and t.zero_stage == 3:
        raise ConfigError(
            "train.compile_blocks does not work with train.zero_stage 3 (DeepSpeed's hooks); use stage 1 or 2"
        )


def check_world(config: Config, world: int) -> int:
    """Gradient accumulation steps on `world` ranks. Raises ConfigError naming the valid micro batches."""
    t = config.train
    if t.global_batch % world:
        raise ConfigError(f"train.global_batch {t.global_batch} does not divide over {world} ranks")
    per_rank = t.global_batch // world
    if per_rank % t.micro_batch:
        raise ConfigError(
            f"train.micro_batch {t.micro_batch} does not divide the {per_rank} images that each of {world} ranks takes "
            f"of train.global_batch {t.global_batch}; valid: {_divisors(per_rank)}"
        )
    return per_rank // t.micro_batch


def _divisors(n: int) -> str:
    return ", ".join(str(k) for k in range(1, n + 1) if n % k == 0)
