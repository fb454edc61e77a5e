"""From bytes and FLOPs to seconds: time = max(FLOP / matrix rate, bytes / bandwidth), the roofline of one operation.

A kernel of ours has four modelled limits in the committed report, in microseconds at the ceilings of an H100: matrix
products, memory, instructions issued, special functions. The first two follow the rates, the last two the
multiprocessors and their clock.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pixelgen_kernels.report.gpu import H100


@dataclass(frozen=True)
class Rates:
    """FLOP/s of bf16 matrix products, bytes/s of memory, how fast instructions are issued, as a share of an H100, and
    FLOP/s of float32 products, as a share of those of bf16."""

    products: float
    memory: float
    instructions: float = 1.0
    float32: float = 67 / 989

    def time(self, flops: float, moved: float, wide: bool = False) -> float:
        """Seconds of an operation that is bound by its products or by memory. wide: its products are of float32."""
        return max(flops / self.products / (self.float32 if wide else 1.0), moved / self.memory)

    def time_of(self, limits: Mapping[str, float]) -> float:
        """Seconds of a kernel from its modelled microseconds by limit, which are those at the report's ceilings."""
        slower = {"tensor": H100.tensor_rate / self.products, "memory": H100.bandwidth / self.memory}
        return max(us * slower.get(limit, 1.0 / self.instructions) for limit, us in limits.items()) * 1e-6
