"""Every tuning configuration of an operator at the sizes of real models; the best is worth keeping where it is better.

    kept = right, and its 80th percentile is below the 20th of the first configuration

Right is what agrees with the first configuration; forward and backward are timed together.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import torch
from machine import spread
from operators import results
from pixelgen_kernels.agreement import relative_error, tolerance, worst
from pixelgen_kernels.bodies import forced
from pixelgen_kernels.registry import OPERATORS, Maker, Operator
from pixelgen_kernels.report.warmup import compile_here, distinct
from pixelgen_kernels.shapes import MODELS, RAGGED, ModelShape
from pixelgen_kernels.tuning import asked, using
from timing import Timer
from torch import Tensor

from gpu.child import device
from gpu.launch_times import prepared

COPIES = 3  # of the inputs, which take turns and so leave the cache


def key_of(operator: Operator, shape: ModelShape) -> str:
    """The sizes that the operator's launchers ask for a configuration by, as a tuned table writes them."""
    with asked() as found:
        operator.launches(shape)
    (sizes,) = {sizes for name, sizes in found if name == operator.name}
    return ",".join(map(str, sizes))


def measure(
    row: Callable[..., None], device_free: Callable[[], None], operator: str, models: list[str], images: int,
    rounds: int,
) -> None:  # fmt: skip
    tuned = OPERATORS[operator]
    shapes = {}  # models that share a key differ in nothing that a configuration depends on
    for shape in ((MODELS | RAGGED)[name] for name in models):
        shapes.setdefault(key_of(tuned, shape), shape.with_batch(images))
    if device() == "cuda":
        every = itertools.product(shapes.values(), tuned.configs)
        for started in distinct(s for shape, config in every for s in tuned.launches(shape, config=config)):
            compile_here(started)
    device_free()
    for key, shape in shapes.items():
        tune(row, tuned, key, shape, rounds)


def tune(row: Callable[..., None], operator: Operator, key: str, shape: ModelShape, rounds: int) -> None:
    place = device()
    timer, dtype = Timer(place), torch.bfloat16 if place == "cuda" else torch.float32
    about = {"operator": operator.name, "model": shape.name, "key": key}
    # two right results are apart by what either may be off; two images show it
    tolerated, small = 2 * tolerance(operator.name, dtype), replace(shape.with_batch(2), parameters=4 * 1000)
    first = outcome(operator, small, dtype, place, operator.configs[0])
    right = []
    for config in operator.configs:
        error = worst(map(apart, outcome(operator, small, dtype, place, config), first))
        if error <= tolerated:
            right.append(config)
        else:
            row(**about, config=list(config), red=f"{operator.name} {key} {list(config)} is off by {error:.1e}")
    calls = [prepared(operator, shape, place) for _ in range(COPIES)]
    samples: dict[tuple, list[float]] = {config: [] for config in right}
    for turn in range(-2, rounds):
        for config, values in samples.items():
            with using(operator.name, config):
                ms = timer(calls[turn % COPIES])
            if turn >= 0:
                values.append(ms)
    times = {config: spread(values) for config, values in samples.items()}
    for config, (low, ms, high) in times.items():
        row(**about, config=list(config), p20=low, p50=ms, p80=high)
    if operator.configs[0] in times:
        best = min(times, key=lambda config: times[config][1])
        shipped = times[operator.configs[0]]
        row(**about, best=list(best), gain=shipped[1] / times[best][1], kept=times[best][2] < shipped[0])


def outcome(
    operator: Operator, shape: ModelShape, dtype: torch.dtype, place: str, config: tuple
) -> list[Tensor | None]:
    """Outputs and gradients with one configuration, from the same random inputs every time."""
    maker = Maker(dtype, place)
    with forced("triton"), using(operator.name, config):
        return results(operator, operator.function, operator.inputs(shape, maker), maker)


def apart(a: Tensor | None, b: Tensor | None) -> float:
    return relative_error(a, b) if a is not None and b is not None else 0.0 if a is b else float("inf")
