"""Milliseconds of a call, of the device on a GPU and of the wall clock on a CPU.

An operator's kernels can be shorter than the host's work to start them. `Timer` measures the device alone: a spin holds
the GPU until the host has issued the whole call. `rounds` measures what a loop takes, host included.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any

import torch

CLOCK = 2e9  # cycles a second of a GPU at most
LONGEST = 5e-3  # seconds that a spin may hold the GPU for the host


class Timer:
    """Milliseconds of one call, again and again; the first calls of a function are to warm up."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        self.host = LONGEST  # seconds that the host took to issue the last call

    def __call__(self, call: Callable[[], Any]) -> float:
        if not self.cuda:
            start = time.perf_counter()
            call()
            return 1e3 * (time.perf_counter() - start)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(int(2 * self.host * CLOCK))
        start.record()
        begin = time.perf_counter()
        call()
        self.host = min(time.perf_counter() - begin, LONGEST)
        end.record()
        end.synchronize()
        return start.elapsed_time(end)


def rounds(call: Callable[[], Any], device: str, warm: int, count: int) -> list[float]:
    """Milliseconds of each of `count` calls in a row, after `warm` more."""
    for _ in range(warm):
        call()
    if device != "cuda":
        timer = Timer(device)
        return [timer(call) for _ in range(count)]
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    torch.cuda.synchronize()
    marks[0].record()
    for mark in marks[1:]:
        call()
        mark.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in itertools.pairwise(marks)]
