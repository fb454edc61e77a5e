"""`pixelgen profile`: the training step of a configuration under torch.profiler, on a CPU or a GPU.

OUT/trace.json.gz   for Perfetto (ui.perfetto.dev) or chrome://tracing: every operator and kernel, named regions
    table.json      time and memory by part, idle share, heaviest operators with their rates, ceilings
    memory.pickle   on a GPU: of every allocation of a step, for pytorch.org/memory_viz

The step is the trainer's: images, noising, forward, loss, backward, clipping, AdamW, averages. The weights are fresh,
and no run's folder is written. One process: there is no communication between ranks in it.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile, record_function
from tqdm import tqdm

from pixelgen_fast import config as cfg
from pixelgen_fast.atomic import replaced
from pixelgen_fast.data import Batch
from pixelgen_fast.data.dali import Loader
from pixelgen_fast.data.image_index import ImageIndex
from pixelgen_fast.engine.assemble import Parts, assemble
from pixelgen_fast.engine.ceilings import MatrixPeak, copy_rate
from pixelgen_fast.engine.feed import Feed
from pixelgen_fast.engine.heartbeat import Heartbeat
from pixelgen_fast.engine.step import training_step
from pixelgen_fast.errors import InputError
from pixelgen_fast.profiling.ledger import STEP, keep
from pixelgen_fast.profiling.regions import Counted, Regions, counting, weights_by_part
from pixelgen_fast.profiling.table import Found, as_dict, lines
from pixelgen_fast.runs.folder import RunFolder

WARM_UP, TIMED = 2, 3
TRACE, TABLE, MEMORY = "trace.json.gz", "table.json", "memory.pickle"
_HISTORY = 200_000  # allocations that a snapshot tells of


class Steps:
    """Training steps of assembled parts. batches: gives those of the next step, and their first image numbers."""

    def __init__(self, parts: Parts, batches: Callable[[], tuple[list[Batch], list[int]]]) -> None:
        self.parts, self.batches = parts, batches
        parts.engine.set_lr(parts.config.optimizer.lr)

    def step(self, at: Callable[[str], object] = lambda stage: None) -> None:
        at("loader")
        batches, first = self.batches()
        training_step(self.parts.engine, self.parts.objective, batches, first, at)

    def wait(self) -> None:
        """Until the device has done what was asked of it."""
        if self.parts.device.type == "cuda":
            torch.cuda.synchronize()


class Noise(ImageIndex):
    """Images that no file holds: classes for a model, and nothing to read."""

    kind = "random pixels"

    def __init__(self, classes: int) -> None:
        super().__init__(Path("random pixels"), [str(k) for k in range(classes)], np.arange(classes))

    def path(self, i: int) -> str:
        return f"random pixels, image {i}"

    def holder(self, i: int) -> Path:
        return self.root

    def read(self, i: int) -> bytes:
        raise NotImplementedError("random pixels are drawn on the device, and never encoded")


def run(config: cfg.Config, out: Path, steps: int, synthetic: bool) -> list[str]:
    """Profile a configuration's step and write OUT; returns the table for people.

    synthetic: random pixels that are on the device already, instead of the run's data.
    Raises InputError for a folder that is a run's, and for what hides the parts of a model.
    """
    _check(config, out, steps)
    # features that a cache keeps would be written there, as training does
    config = replace(config, alignment=replace(config.alignment, cache=None))
    with started(config, synthetic) as stepping, tqdm(total=WARM_UP + TIMED + 1 + steps, unit="step") as bar:
        found = measure(stepping, out, steps, bar.update)
    with replaced(out / TABLE) as work:
        work.write_text(json.dumps(as_dict(found), indent=1, allow_nan=False) + "\n")
    files = [TRACE, TABLE, *([MEMORY] if found.device == "cuda" else [])]
    return [*lines(found), "", f"{out}: {', '.join(files)}; open {TRACE} at ui.perfetto.dev"]


def _check(config: cfg.Config, out: Path, steps: int) -> None:
    if steps < 1:
        raise InputError(f"--steps is {steps}; it must be at least 1")
    for name in ("compile_blocks", "cuda_graph"):
        if getattr(config.train, name):
            raise InputError(f"train.{name} hides the parts of the model from a profile; set train.{name}=false")
    if out.is_file() or RunFolder(out).metrics.exists() or RunFolder(out).checkpoints.exists():
        raise InputError(f"{out} is a file or a run's folder; choose another folder with --out")


@contextmanager
def started(config: cfg.Config, synthetic: bool) -> Iterator[Steps]:
    """The steps of a configuration, from its data or on random pixels."""
    if synthetic:
        parts = assemble(config, Heartbeat(), Noise(config.data.num_classes or 1000))
        yield Steps(parts, random_batches(parts))
        return
    parts = assemble(config, Heartbeat())
    order = parts.order(0)
    with Loader(parts.index, order, config.data, parts.device) as loader:
        yield Steps(parts, Feed(loader, order).take)


def random_batches(parts: Parts) -> Callable[[], tuple[list[Batch], list[int]]]:
    """Gives the same random pixels again and again."""
    count, size, device = parts.config.train.micro_batch, parts.config.data.image_size, parts.device
    generator = torch.Generator(device).manual_seed(0)
    images = torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8, device=device, generator=generator)
    numbers = torch.arange(count, device=device)
    accumulation = parts.order(0).accumulation
    batch = Batch(images, numbers % len(parts.classes), numbers)
    return lambda: ([batch] * accumulation, [0] * accumulation)


def measure(stepping: Steps, out: Path, steps: int, done: Callable[[], object] = lambda: None) -> Found:
    """Warm up, time some steps alone, count the work of one, and profile the next; writes the trace into `out`."""
    parts, gpu = stepping.parts, stepping.parts.device.type == "cuda"
    dtype = torch.bfloat16 if parts.precision == "bf16" else torch.float32
    # measured on both sides of the steps: what else the machine does is seldom there in both
    peak = MatrixPeak(8192 if gpu else 1024, parts.device, dtype)
    copied = _measured(peak, gpu)
    for _ in range(WARM_UP):
        stepping.step()
        done()
    alone = []
    for _ in range(TIMED):
        stepping.wait()
        begin = time.perf_counter()
        stepping.step()
        stepping.wait()
        alone.append(time.perf_counter() - begin)
        done()
    out.mkdir(parents=True, exist_ok=True)
    regions = Regions(parts.objective)
    with regions, snapshot(out / MEMORY, gpu):
        counted = _count(stepping, regions)
        done()
    with regions:
        trace, profiled = profiled_steps(stepping, regions, steps, gpu, done)
    trace.export_chrome_trace(str(out / TRACE))
    ledger = keep(trace.events(), regions.parts, steps, gpu)
    return Found(
        device=parts.device.type,
        images=parts.config.train.global_batch,
        steps=steps,
        alone=statistics.median(alone),
        profiled=profiled / steps,
        ledger=ledger,
        work=counted.work,
        saved=dict(counted.saved),
        weights=weights_by_part(parts.objective, {part for part, _ in ledger.parts}),
        copy=max(copied, _measured(peak, gpu)),
        product=peak.measure(),
    )


def _measured(peak: MatrixPeak, gpu: bool) -> float:
    """Bytes a second of a copy, and some more matrix products for the best of them."""
    peak.measure(6)
    return copy_rate(peak.a.device, 1 << (30 if gpu else 26))


def _count(stepping: Steps, regions: Regions) -> Counted:
    weights = dict(stepping.parts.objective.named_parameters())
    with counting(regions, weights) as counted:
        stepping.step()
    return counted


def profiled_steps(
    stepping: Steps, regions: Regions, steps: int, gpu: bool, done: Callable[[], object]
) -> tuple[Any, float]:
    """The profiler that has seen the steps, and the seconds that they took under it, with the wait for the device."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    stepping.wait()
    total = 0.0
    with profile(activities=activities, record_shapes=True) as trace:
        for _ in range(steps):
            begin = time.perf_counter()
            with record_function(STEP):
                stepping.step(regions.at)
                regions.leave()
            total += time.perf_counter() - begin
            done()
        begin = time.perf_counter()
        stepping.wait()
        total += time.perf_counter() - begin
    return trace, total


@contextmanager
def snapshot(path: Path, gpu: bool) -> Iterator[None]:
    """Write what is allocated on the GPU, when and by which line, in what is inside; nothing without one."""
    if not gpu:
        yield
        return
    torch.cuda.memory._record_memory_history(max_entries=_HISTORY)
    try:
        yield
        with replaced(path) as work:
            torch.cuda.memory._dump_snapshot(str(work))
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
