"""The training step of a configuration: time, rate, memory, and the numbers that its sides must agree on.

A side is "ours" (our kernels), "reference" (the operators' definitions, eager) or "compiled" (torch.compile of them).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import triton
from machine import spread
from pixelgen_kernels.attention import attention_backend
from pixelgen_kernels.report.warmup import warmup
from timing import rounds
from training import Training, load_config

from gpu.child import device
from pixelgen_fast import config as cfg
from pixelgen_fast.engine.launches import step_launches
from pixelgen_fast.engine.metrics import device_peak

COMPARED = 3  # steps before the timed ones, whose numbers are kept


def settings(config: str, images: int, side: str, overrides: Sequence[str]) -> cfg.Config:
    return load_config(config, images, *overrides, *(["train.compile_blocks=true"] if side == "compiled" else []))


def ready(config: cfg.Config, side: str) -> None:
    """Compile our kernels before the device is ours."""
    if side == "ours":
        gpu = torch.cuda.get_device_properties().multi_processor_count if device() == "cuda" else 2
        print(warmup(step_launches(config, multiprocessors=gpu), "this step"))


def build(config: cfg.Config, side: str) -> Training:
    return Training(config, device(), "triton" if side == "ours" else "reference")


def measure(
    row: Callable[..., None], device_free: Callable[[], None], config: str, images: int, side: str = "ours",
    overrides: Sequence[str] = (), steps: int = 12,
) -> None:  # fmt: skip
    chosen = settings(config, images, side, overrides)
    ready(chosen, side)
    device_free()
    try:
        attention = backend(chosen)
    except ValueError as error:  # the library that is asked for is not installed
        row(absent=str(error))
        return
    try:
        _measure(row, chosen, side, attention, {"config": config, "overrides": list(overrides)}, steps)
    except torch.cuda.OutOfMemoryError as error:
        row(**{"red" if side == "ours" else "absent": f"does not fit: {error}".splitlines()[0]})


def _measure(
    row: Callable[..., None], chosen: cfg.Config, side: str, attention: str, about: dict[str, Any], steps: int
) -> None:
    images = chosen.train.micro_batch
    begin = time.perf_counter()
    with compiled_kernels() as compiled:
        training = build(chosen, side)
        with training.gradient_norms() as norms:
            training.step()
        numbers = [_numbers(training)]
        while len(numbers) < COMPARED:
            training.step()
            numbers.append(_numbers(training))
    seconds = time.perf_counter() - begin
    if device() == "cuda":
        torch.cuda.reset_peak_memory_stats()
    low, ms, high = spread(rounds(training.step, device(), 3, steps))
    peak, what = device_peak(training.device)
    last = _numbers(training)[0]
    row(
        **about, side=side, images=images, engine=training.engine_name, attention=attention, ms=ms, p20=low, p80=high,
        images_per_s=1e3 * images / ms, tflop_per_s=training.flops / ms / 1e9,
        share=training.flops / ms * 1e3 / peak, share_of=what, losses=[a for a, _ in numbers],
        gradient_norms=[b for _, b in numbers], by_parameter={name: float(norm) for name, norm in norms.items()},
        last_loss=last, seconds_to_numbers=seconds, kernels_compiled=compiled,
        peak_gb=torch.cuda.max_memory_allocated() / 1e9 if device() == "cuda" else None,
    )  # fmt: skip
    wrong = [f"{x}" for pair in numbers for x in pair if not math.isfinite(x)]
    wrong += [name for name, norm in norms.items() if not math.isfinite(float(norm))]
    if wrong or not math.isfinite(last):
        row(red=f"not finite: {', '.join(wrong[:8]) or 'the last loss'}")
    if side == "ours" and compiled and training.engine_name == "deepspeed":  # whose step the list is of
        row(red=f"compiled after the warm-up: {', '.join(sorted(set(compiled)))}")


def backend(config: cfg.Config) -> str:
    dtype = torch.bfloat16 if device() == "cuda" else torch.float32
    return attention_backend(device(), dtype, config.model.hidden_size // config.model.num_heads)


def _numbers(training: Training) -> tuple[float, float]:
    return float(training.loss.detach()), float(training.engine.grad_norm)


@contextmanager
def compiled_kernels() -> Iterator[list[str]]:
    """The names of the kernels that Triton compiles inside, those found in its cache left out."""
    names: list[str] = []

    def listen(*, src: Any, cache_hit: bool, **_: Any) -> None:
        if not cache_hit:
            names.append(getattr(src, "name", str(src)))

    before, triton.knobs.compilation.listener = triton.knobs.compilation.listener, listen
    try:
        yield names
    finally:
        triton.knobs.compilation.listener = before
