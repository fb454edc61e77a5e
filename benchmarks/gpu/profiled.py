"""Where the time of a training step goes: device time by kernel, and the share in which the device waits."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from machine import spread
from timing import rounds
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from gpu.child import device
from gpu.steps import build, ready, settings

LISTED = 60


def measure(
    row: Callable[..., None], device_free: Callable[[], None], config: str, images: int, side: str = "ours",
    overrides: Sequence[str] = (), steps: int = 2, timed: int = 8,
) -> None:  # fmt: skip
    chosen = settings(config, images, side, overrides)
    ready(chosen, side)
    device_free()
    training, cuda = build(chosen, side), device() == "cuda"
    whole = spread(rounds(training.step, device(), 3, timed))[1]
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as trace:
        rounds(training.step, device(), 0, steps)
    times: dict[str, float] = {}
    calls: dict[str, float] = {}
    for event in trace.key_averages():
        # on a GPU, the event of an operator or of an annotation repeats the time of the kernels inside
        us = event.self_device_time_total if cuda else event.self_cpu_time_total
        if us > 0 and (not cuda or (event.device_type == DeviceType.CUDA and not event.is_user_annotation)):
            times[event.key] = times.get(event.key, 0.0) + us / steps
            calls[event.key] = calls.get(event.key, 0.0) + event.count / steps
    busy = sum(times.values()) / 1e3
    about = {"config": config, "side": side, "images": images, "overrides": list(overrides)}
    # the step is timed without the profiler; what of it no kernel fills, the device waits for the host
    row(**about, step_ms=whole, busy_ms=busy, idle_share=1 - busy / whole, kernels=sum(calls.values()))
    names = sorted(times, key=lambda name: -times[name])
    for name in names[:LISTED]:
        row(**about, kernel=name[:120], us=times[name], calls=calls[name])
    if rest := names[LISTED:]:
        row(**about, kernel="all others", us=sum(times[n] for n in rest), calls=sum(calls[n] for n in rest))
    if not names:
        row(red="the profiler saw no kernel")
