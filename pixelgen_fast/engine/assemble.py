"""From a configuration to the parts of a run, top to bottom. Nothing is written, and nothing has been trained.

device, ranks -> data set -> model -> alignment -> objective -> optimizer -> ZeRO
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from pixelgen_kernels.attention import attention_backend
from pixelgen_kernels.bodies import describe_bodies

from pixelgen_fast import config as cfg
from pixelgen_fast import hub, models
from pixelgen_fast.data.held_out import split
from pixelgen_fast.data.image_index import ImageIndex
from pixelgen_fast.data.order import Order
from pixelgen_fast.data.roots import open_root
from pixelgen_fast.data.sampler import describe_shares
from pixelgen_fast.device import choose_device
from pixelgen_fast.engine import zero
from pixelgen_fast.engine.alignment import build_alignment
from pixelgen_fast.engine.graph import check_graph
from pixelgen_fast.engine.heartbeat import Heartbeat
from pixelgen_fast.engine.memory import keep_freed_memory
from pixelgen_fast.engine.metrics import forward_flops
from pixelgen_fast.engine.objective import TrainingObjective, build_objective
from pixelgen_fast.engine.parallel import wrap_blocks
from pixelgen_fast.engine.run_optimizer import run_optimizer
from pixelgen_fast.errors import InputError
from pixelgen_fast.models.system import BaseSystem
from pixelgen_fast.runs import checkpoint
from pixelgen_fast.runs.draw import Generator, load_for_other_classes
from pixelgen_fast.runs.export import published_in, read_exported
from pixelgen_fast.runs.folder import RunFolder
from pixelgen_fast.runs.kept import with_kept


@dataclass(frozen=True)
class Parts:
    """What a process of a run consists of.

    built: the configuration that the model was built from, with the kept copies of what it is built on.
    precision: "bf16" or "fp32". operators: what runs them, for the log. image_flops: of a training image, both passes.
    objective: what `engine` trains. published: systems of interop/ whose published weights run.init began from.
    index: what it trains on. held: images that it does not, where there are some.
    """

    config: cfg.Config
    built: cfg.Config
    folder: RunFolder
    device: torch.device
    precision: str
    rank: int
    world: int
    index: ImageIndex
    operators: str
    image_flops: int
    objective: TrainingObjective
    engine: zero.ZeroEngine
    published: list[str] = field(default_factory=list)
    held: ImageIndex | None = None

    @property
    def classes(self) -> list[str]:
        return self.index.classes

    @property
    def total(self) -> int:
        """Images at which the run ends: train.images, rounded up to whole steps."""
        batch = self.config.train.global_batch
        return -(-self.config.train.images // batch) * batch

    def order(self, start: int) -> Order:
        """The images of this rank from image `start` of the run on."""
        t = self.config.train
        return Order(self.config.run.seed, t.global_batch, t.micro_batch, self.rank, self.world, start)


def assemble(config: cfg.Config, heart: Heartbeat, index: ImageIndex | None = None) -> Parts:
    """Join the processes of a run and build its parts. heart: of this rank.

    index: of the images, where it is not that of data.root.

    Raises UserError for settings and data that do not fit, FileNotFoundError for a missing root.
    """
    device, precision = resolve_device(config)
    if device.type == "cpu":
        keep_freed_memory()
    device, rank, world = join_ranks(config, device, heart, zero.init_distributed)
    accumulation = cfg.check_world(config, world)
    folder = RunFolder(Path(config.run.dir))
    heart.at("reading the data set")
    index, held = open_data(config.data) if index is None else (index, None)
    shares = describe_shares(index) if config.data.class_balanced else None

    heart.at("building the model")
    # once there is a checkpoint, the copies that were made for it are those that go with it
    begun = checkpoint.checkpoints(folder.checkpoints)
    built = with_kept(config, folder.root) if begun else config
    model = models.build_model(built, len(index.classes))
    model.check_complete()
    flops = 3 * forward_flops(model)
    # refuses what was asked for and cannot run here, before anything is written
    operators = describe_operators(device, precision, model.head_dim)
    if config.sample.guide is not None and rank == 0:
        Generator(model, config, index.classes, "raw", 0).guide(config.sample.guide)
    published = _initialise(model, config.run.init, rank)
    wrap_blocks(model.blocks(), recompute=config.train.recompute, compile_blocks=config.train.compile_blocks)
    alignment = build_alignment(config, model, index, device)
    objective = build_objective(model, config, alignment)
    check_graph(config, device, world, accumulation, objective)
    engine = zero.ZeroEngine(
        objective,
        run_optimizer(config.optimizer, model, alignment),
        stage=config.train.zero_stage,
        micro_batch=config.train.micro_batch,
        accumulation=accumulation,
        dtype=precision,
        whole_modules=model.whole_modules(),
    )
    if shares and rank == 0:
        print(shares)
    return Parts(
        config, built, folder, device, precision, rank, world, index, operators, flops, objective, engine, published,
        held,
    )  # fmt: skip


def open_data(data: cfg.Data) -> tuple[ImageIndex, ImageIndex | None]:
    """The images to train on, and those that are held out, where data.validation names some.

    Raises InputError where the latter are of other classes, and what `open_root` and `split` raise.
    """
    index, v = open_root(data.root, expected_classes=data.num_classes), data.validation
    if v.share > 0:
        return split(index, v.share, v.seed)
    if v.root is None:
        return index, None
    try:
        held = open_root(v.root)
    except FileNotFoundError as error:
        raise InputError(f"data.validation.root {v.root}: {error}") from error
    if held.classes != index.classes:
        other = sorted(set(held.classes) ^ set(index.classes))
        raise InputError(
            f"data.validation.root {v.root} has {len(held.classes):,} classes and data.root {len(index.classes):,}; in "
            f"one of the two only: {', '.join(other[:5])}"
        )
    return index, held


def join_ranks(
    config: cfg.Config, device: torch.device, heart: Heartbeat, join: Callable[..., tuple[int, int, int]]
) -> tuple[torch.device, int, int]:
    """Join the ranks of the run: this one's (device, rank, world size). join: `group.join`, or what calls it."""
    heart.at("meeting the others")
    # a stuck rank is named before a collective gives up
    rank, world, local_rank = join(device, heart.store, 1.5 * config.run.stuck_limit)
    return torch.device("cuda", local_rank) if device.type == "cuda" else device, rank, world


def _initialise(model: BaseSystem, weights: str | None, rank: int) -> list[str]:
    """Begin from an exported model, where run.init names one. Returns whose published weights these are."""
    if not weights:
        return []
    state, about = read_exported(hub.local(weights))
    said = load_for_other_classes(model, state, weights)
    if said and rank == 0:
        print(said)
    return published_in(about)


def describe_operators(device: torch.device, precision: str, head_dim: int) -> str:
    """Two lines for the log: which bodies the operators run, and which attention.

    Raises ValueError for what PIXELGEN_OPS or PIXELGEN_ATTENTION asks for and cannot run on the device.
    """
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    return f"{describe_bodies(device.type)}\n{attention_backend(device, dtype, head_dim)}"


def resolve_device(config: cfg.Config) -> tuple[torch.device, str]:
    """(device, precision) of a run. Raises InputError for CUDA where there is none, or bf16 on a CPU."""
    device, precision = choose_device(config.run.device), config.train.precision
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" else "fp32"
    if precision == "bf16" and device.type == "cpu":
        raise cfg.ConfigError(
            "train.precision is bf16, but the run is on a CPU, where it is 6x slower; use fp32 or auto"
        )
    return device, precision
