"""What a machine reaches: the rate of its best matrix product, and of its best copy, each measured in moments."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch


class MatrixPeak:
    """The best matrix product of size^3 on this machine so far; measured again between the things it judges."""

    def __init__(
        self, size: int = 2048, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        self.a, self.b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        self.size, self.best = size, float("inf")

    def measure(self, repeats: int = 1) -> float:
        """FLOP/s of the best product, after `repeats` more."""
        for _ in range(repeats):
            self.best = min(self.best, _seconds(lambda: self.a @ self.b, self.a.device))
        return 2 * self.size**3 / self.best


def copy_rate(device: str | torch.device = "cpu", count: int = 1 << 26, repeats: int = 6) -> float:
    """Bytes a second, read and written together, of the best of `repeats` copies of `count` bytes.

    count: more than caches hold.
    """
    source = torch.zeros(count, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    return 2 * count / min(_seconds(lambda: target.copy_(source), source.device) for _ in range(repeats))


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Of one call: of the wall clock on a CPU, of the device on a GPU."""
    if device.type != "cuda":
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3
