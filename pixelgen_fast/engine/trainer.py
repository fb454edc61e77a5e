"""The training loop. Progress is counted in images: a step takes images nimg .. nimg + global batch of the run.

Everything a step draws is a function of the image number, so a run that is stopped and started again, on any number of
ranks and at any ZeRO stage, goes on as if it had never stopped.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from pixelgen_kernels.attention import attention_backend
from pixelgen_kernels.bodies import describe_bodies

from pixelgen_fast import config as cfg
from pixelgen_fast.data import Batch
from pixelgen_fast.data.dali import Loader
from pixelgen_fast.data.roots import open_root
from pixelgen_fast.engine import checkpoint, generator, zero
from pixelgen_fast.engine.alignment import build_alignment
from pixelgen_fast.engine.graph import capture, check_graph
from pixelgen_fast.engine.memory import keep_freed_memory
from pixelgen_fast.engine.metrics import Metrics, device_peak, forward_flops, memory_used
from pixelgen_fast.engine.objective import FlowMatching
from pixelgen_fast.engine.optimizer import ema_key, run_optimizer
from pixelgen_fast.engine.parallel import wrap_blocks
from pixelgen_fast.engine.schedule import learning_rate
from pixelgen_fast.engine.signals import REQUEUE, StopRequest, any_rank
from pixelgen_fast.engine.watch import SkipWatch
from pixelgen_fast.eval.curves import read_metrics, save_curves
from pixelgen_fast.eval.grid import save_grid

log = logging.getLogger(__name__)

# what a checkpoint's tensors depend on, beside the section `model`
FIXED = (
    "data.image_size",
    "data.num_classes",
    "alignment.teacher",
    "alignment.layer",
    "alignment.projector",
    "alignment.projector_hidden",
)


class TrainingError(RuntimeError):
    """The run cannot go on; the message says why and what is safe."""


class Trainer:
    """One process of a run: `Trainer(config).run()` trains to the end and returns the exit code.

    Raises before the first step when something does not fit: ConfigError or ValueError for settings and data,
    FileNotFoundError for a missing root, CheckpointError for what cannot be resumed, TrainingError for a full disk.
    """

    def __init__(self, config: cfg.Config) -> None:
        self.config = config
        self.device, precision = resolve_device(config)
        if self.device.type == "cpu":
            keep_freed_memory()
        self.rank, self.world, local_rank = zero.init_distributed(self.device)
        if self.device.type == "cuda":
            self.device = torch.device("cuda", local_rank)
        self.accumulation = cfg.check_world(config, self.world)
        self.folder = Path(config.run.dir)
        index = open_root(config.data.root, expected_classes=config.data.num_classes)
        self.classes = index.classes

        # once there is a checkpoint, the copy of a DINO that was made for it is the one that goes with it
        begun = checkpoint.checkpoints(self.folder / "checkpoints")
        self.built = generator.with_kept_dino(config, self.folder) if begun else config
        model = generator.build_model(self.built, len(self.classes))
        with torch.device("meta"):
            counted = generator.build_model(self.built, len(self.classes))
        self.image_flops = 3 * forward_flops(counted, config.data.image_size)
        # refuses what was asked for and cannot run here, before anything is written
        self.operators = describe_operators(config, self.device, precision)
        if config.run.init:
            state, _ = generator.read_exported(Path(config.run.init))
            generator.load_weights(model, state, config.run.init)
        wrap_blocks(model.blocks(), recompute=config.train.recompute, compile_blocks=config.train.compile_blocks)
        alignment = build_alignment(config, model, index, self.device)
        module = FlowMatching(model, config.objective, config.run.seed, len(self.classes), alignment)
        check_graph(config, self.device, self.world, self.accumulation, module)
        optimizer = run_optimizer(config.optimizer, model, alignment)
        self.engine = zero.ZeroEngine(
            module,
            optimizer,
            stage=config.train.zero_stage,
            micro_batch=config.train.micro_batch,
            accumulation=self.accumulation,
            dtype=precision,
            whole_modules=model.whole_modules(),
        )
        self.nimg, self.saved, self.seconds = 0, -1, 0.0
        self._resume()
        self._check_disk()
        if config.train.cuda_graph:
            capture(module, config.train.micro_batch, config.data.image_size, self.device)
        if self.rank == 0:
            generator.keep_dino(self.folder, self.built)
            self._describe_run(index, precision)
        self.metrics = Metrics(
            self.folder,
            self.rank,
            self.nimg,
            self.total,
            tensorboard=config.log.tensorboard,
            wandb_project=config.log.wandb_project,
            config=cfg.to_dict(config),
        )
        d = config.data
        self.loader = Loader(
            index,
            seed=config.run.seed,
            size=d.image_size,
            global_batch=config.train.global_batch,
            micro_batch=config.train.micro_batch,
            rank=self.rank,
            world=self.world,
            start=self.nimg,
            device=self.device,
            crop=d.crop,
            flip=d.flip,
            workers=d.workers,
            threads=d.threads,
            prefetch=d.prefetch,
            hw_decoder_load=d.hw_decoder_load,
        )
        self.watch = SkipWatch(self.device)
        self.objective = module
        # number and sum of the losses since the last row of the log, then the sum of each part where there are several;
        # those of a loss that is not finite are left out
        self.losses = torch.zeros(2 + len(self.parts), device=self.device)

    @property
    def total(self) -> int:
        """Images at which the run ends: train.images, rounded up to whole steps."""
        batch = self.config.train.global_batch
        return -(-self.config.train.images // batch) * batch

    @property
    def parts(self) -> list[str]:
        """The parts of the loss that have columns of their own in the metrics: none if it has but one."""
        return list(self.objective.weights) if len(self.objective.weights) > 1 else []

    def run(self) -> int:
        c = self.config
        batch = c.train.global_batch
        with StopRequest() as self.signals, self.loader:
            mark = Mark(self.nimg, self.loader)
            while self.nimg < self.total:
                self.engine.set_lr(learning_rate(c.optimizer, self.nimg, self.total))
                self.train_step([next(self.loader) for _ in range(self.accumulation)])
                self.nimg += batch
                self.metrics.advance(batch)
                self.watch.push(self.engine.skipped_in_a_row, self.nimg - batch, self.nimg)
                stop = self._should_stop()
                if crossed(self.nimg, batch, c.log.every_images) or self.nimg >= self.total:
                    mark = self._log(mark)
                if stop or crossed(self.nimg, batch, c.save.every_images):
                    with mark.paused():
                        self._save(last=stop)
                if stop:
                    return self._stopped()
                if crossed(self.nimg, batch, c.sample.grid_every_images) and self.nimg < self.total:
                    with mark.paused():
                        self._draw(self.folder / "samples" / f"{self.nimg:012d}.png")
            self._save(last=True)
            self._finish()
        return 0

    def train_step(self, batches: list[Batch]) -> None:
        """One optimizer step on the micro-batches of this rank. Nothing here waits for the device."""
        first = self.nimg + self.rank * self.config.train.micro_batch * self.accumulation
        for number, batch in enumerate(batches):
            self.objective.seed_dropout(first + number * self.config.train.micro_batch)
            loss = self.engine(batch.images, batch.labels, batch.numbers)
            finite = torch.isfinite(loss.detach())
            # A loss that is not finite must not pass as a step, even if its gradient happens to be.
            self.engine.backward(loss * torch.where(finite, 1.0, torch.nan))
            self.engine.step()
            losses = [torch.ones_like(loss), loss.detach(), *(self.objective.parts[name] for name in self.parts)]
            self.losses += torch.where(finite, torch.stack(losses), 0.0)

    def _should_stop(self) -> bool:
        """Whether all ranks stop here: a signal to any of them, or too many steps in a row that were not finite."""
        in_a_row = 0
        for first, last, in_a_row in self.watch.poll():
            self.metrics.say(
                f"step on images {first:,} to {last:,} skipped: loss or gradient is not finite ({in_a_row} in a row)"
            )
        wishes = [self.signals.requested, in_a_row >= self.config.train.max_bad_steps]
        stop, failed = any_rank(wishes, self.engine.host_group)
        if failed:
            self.metrics.close()
            last = checkpoint.latest_valid(self.folder / "checkpoints", self.engine.host_group)
            raise TrainingError(
                f"{self.config.train.max_bad_steps} steps in a row had a loss or gradient that is not finite, the last "
                f"at image {self.nimg:,}; the last good checkpoint is {last or 'none'}. Resume from it with a smaller "
                "optimizer.lr, a smaller optimizer.clip or train.precision=fp32"
            )
        return stop

    def _log(self, mark: Mark) -> Mark:
        """Write a row of metrics; the only place of the loop that waits for the device."""
        if self.world > 1:
            dist.all_reduce(self.losses)
        (count, *sums), seconds = self.losses.tolist(), mark.elapsed()
        self.losses.zero_()
        means = [total / count if count else None for total in sums]
        alignment = self.objective.alignment
        self.seconds += seconds
        rate = (self.nimg - mark.nimg) / seconds
        self.metrics.write(
            {
                "nimg": self.nimg,
                "step": self.nimg // self.config.train.global_batch,
                "loss": means[0],
                **{f"loss_{name}": mean for name, mean in zip(self.parts, means[1:], strict=True)},
                "grad_norm": float(self.engine.grad_norm),
                "lr": learning_rate(self.config.optimizer, self.nimg - self.config.train.global_batch, self.total),
                "images_per_second": rate,
                "model_flops": rate * self.image_flops,
                "model_flops_share": rate * self.image_flops / (self.peak * self.world) if self.rank == 0 else 0.0,
                "memory_bytes": memory_used(self.device),
                "loader_wait_share": mark.waited(self.loader) / seconds,
                **({"teacher_share": alignment.stopwatch.take() / seconds} if alignment is not None else {}),
                "skipped_steps": int(self.engine.skipped),
                "replaced_images": len(self.loader.replaced),
            }
        )
        return Mark(self.nimg, self.loader)

    def _save(self, last: bool) -> None:
        """Write a checkpoint. One that cannot be written costs nothing yet: the run goes on, unless it ends here."""
        if self.saved == self.nimg:
            return
        state = {"config": cfg.to_dict(self.config), "classes": self.classes, "seconds": self.seconds}
        folder = self.folder / "checkpoints"
        try:
            checkpoint.save(folder, self.engine, nimg=self.nimg, state=state, keep=self.config.save.keep)
        except checkpoint.CheckpointError as error:
            if last:
                raise
            self.metrics.say(f"no checkpoint at image {self.nimg:,}, the run goes on and tries again later: {error}")
            return
        self.saved = self.nimg

    def _resume(self) -> None:
        """Restore the newest valid checkpoint of run.resume or run.dir and say what came back."""
        source = self.config.run.resume
        group = self.engine.host_group
        own = checkpoint.latest_valid(self.folder / "checkpoints", group)
        # What this run has saved itself is newer than what it once began from.
        path = own if own or not source else checkpoint.find(source, group)
        if path is None:
            return
        state = checkpoint.read_state(path)
        changed = differences(state["config"], cfg.to_dict(self.config))
        fixed = [key for key in changed if key.startswith("model.") or key in FIXED]
        if fixed or state["classes"] != self.classes:
            what = ", ".join(f"{key} ({changed[key]})" for key in fixed) or f"classes of {self.config.data.root}"
            raise cfg.ConfigError(
                f"{path} was trained with other settings: {what}; choose another run.dir, or change them back"
            )
        checkpoint.load(path, self.engine)
        self.nimg = self.saved = state["nimg"]
        self.seconds = state["seconds"]
        if self.rank == 0:
            print(
                f"resumed {path}: image {self.nimg:,} of {self.total:,}, weights, optimizer moments and averages "
                f"{', '.join(str(d) for d in self.config.optimizer.ema)} restored"
            )
            for key, change in changed.items():
                print(f"  {key} has changed: {change}")

    def _check_disk(self) -> None:
        """Refuse to start a run whose checkpoints will not fit."""
        if self.rank:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        numel = sum(torch.Size(shape).numel() for shape in self.engine.shapes.values())
        need = 4 * numel * (3 + len(self.config.optimizer.ema)) * (self.config.save.keep + 1)
        free = shutil.disk_usage(self.folder).free
        if free < need:
            raise TrainingError(
                f"{self.folder}: {self.config.save.keep} checkpoints and one being written need {need / 1e9:.1f} GB, "
                f"{free / 1e9:.1f} GB are free; free some, choose another run.dir or a smaller save.keep"
            )

    def _describe_run(self, index: object, precision: str) -> None:
        (self.folder / "config.yaml").write_text(cfg.to_yaml(self.config))
        (self.folder / "classes.json").write_text(json.dumps(self.classes) + "\n")
        self.peak, what = device_peak(self.device)
        t = self.config.train
        print(
            f"{self.folder}: {len(index):,} images in {len(self.classes)} classes; "
            f"{sum(torch.Size(s).numel() for s in self.engine.shapes.values()):,} parameters; "
            f"{self.world} x {self.device.type}, {precision}, ZeRO stage {t.zero_stage}; "
            f"{t.global_batch} images a step = {self.world} ranks x {self.accumulation} x {t.micro_batch}\n"
            f"peak: {self.peak / 1e9:,.0f} GFLOP/s ({what})\n"
            f"{self.operators}"
        )

    def _draw(self, path: Path) -> None:
        """A labelled grid on fixed noise from the averaged weights, drawn by rank 0. All ranks call it."""
        state = self.engine.state_dict(ema_key(self.config.optimizer.ema[0]), to=0)
        if self.rank == 0:
            s = self.config.sample
            model = generator.build_model(self.built, len(self.classes))
            generator.load_weights(model, generator.strip_prefix(state), "the average of this run")
            drawer = generator.Generator(model.to(self.device).eval(), self.config, self.classes, "ema", self.nimg)
            labels = torch.arange(min(s.grid_classes, len(self.classes))).repeat_interleave(s.grid_per_class)
            images = drawer.draw(labels)
            path.parent.mkdir(parents=True, exist_ok=True)
            names = [self.classes[int(y)] for y in labels[:: s.grid_per_class]]
            save_grid(images.numpy(), path, columns=s.grid_per_class, row_titles=names)
        if self.world > 1:
            dist.barrier()

    def _stopped(self) -> int:
        self.metrics.close()
        if self.rank == 0:
            print(f"stopped by a signal at image {self.nimg:,}, saved; the same command goes on from here")
        return REQUEUE

    def _finish(self) -> None:
        grid = self.folder / "final.png"
        self._draw(grid)
        self.metrics.close()
        if self.rank:
            return
        save_curves(read_metrics(self.folder / "metrics.jsonl"), self.folder / "loss.png", title=self.folder.name)
        print(
            f"done: {self.nimg:,} images in {self.seconds:.0f} s; samples {grid}, loss {self.folder / 'loss.png'}, "
            f"weights {self.folder / 'checkpoints'}. Next: pixelgen evaluate {self.folder}"
        )


class Mark:
    """Where the present interval of the log began; saving and drawing do not count as training time."""

    def __init__(self, nimg: int, loader: Loader) -> None:
        self.nimg, self.start, self.wait = nimg, time.perf_counter(), loader.wait_seconds

    def elapsed(self) -> float:
        return time.perf_counter() - self.start

    @contextmanager
    def paused(self) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.start += time.perf_counter() - begin

    def waited(self, loader: Loader) -> float:
        return loader.wait_seconds - self.wait


def crossed(nimg: int, batch: int, interval: int) -> bool:
    """Whether the step of `batch` images that ended at nimg reached a multiple of the interval (0: never)."""
    return interval > 0 and nimg // interval > (nimg - batch) // interval


def resolve_device(config: cfg.Config) -> tuple[torch.device, str]:
    """(device, precision) of a run. Raises ConfigError for CUDA where there is none, or bf16 on a CPU."""
    wanted, precision = config.run.device, config.train.precision
    if wanted == "cuda" and not torch.cuda.is_available():
        raise cfg.ConfigError("run.device is cuda, but this machine has no usable CUDA device; use run.device=cpu")
    device = torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" else "fp32"
    if precision == "bf16" and device.type == "cpu":
        raise cfg.ConfigError(
            "train.precision is bf16, but the run is on a CPU, where it is 6x slower; use fp32 or auto"
        )
    return device, precision


def describe_operators(config: cfg.Config, device: torch.device, precision: str) -> str:
    """Two lines for the log: which bodies the operators run, and which attention.

    Raises ValueError for what PIXELGEN_OPS or PIXELGEN_ATTENTION asks for and cannot run on the device.
    """
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    head_dim = config.model.hidden_size // config.model.num_heads
    return f"{describe_bodies(device.type)}\n{attention_backend(device, dtype, head_dim)}"


def differences(old: dict, new: dict, prefix: str = "") -> dict[str, str]:
    """Dotted keys whose values differ between two configurations, with `old -> new`; run.* does not count."""
    changed: dict[str, str] = {}
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            changed |= {} if prefix == "" and key == "run" else differences(a, b, f"{prefix}{key}.")
        elif a != b:
            changed[f"{prefix}{key}"] = f"{a} -> {b}"
    return changed
