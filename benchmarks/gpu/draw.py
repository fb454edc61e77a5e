"""Images per second of drawing with guidance (benchmarks/sample.py), by body of the operators."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from machine import spread
from sample import fresh_generator, seconds_by_body
from training import load_config

from gpu.child import device


def measure(
    row: Callable[..., None], device_free: Callable[[], None], config: str, images: int, steps: int, guidance: float,
    bodies: list[str], rounds: int, overrides: Sequence[str] = (),
) -> None:  # fmt: skip
    chosen = load_config(config, images, *overrides)
    device_free()
    generator = fresh_generator(chosen, device())
    for body, seconds in seconds_by_body(generator, bodies, images, steps, guidance, rounds).items():
        low, median, high = spread(seconds)
        row(
            config=config, images=images, steps=steps, guidance=guidance, body=body, p20=low, p50=median, p80=high,
            images_per_s=images / median,
        )  # fmt: skip
