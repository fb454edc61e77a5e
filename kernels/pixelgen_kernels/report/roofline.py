"""A lower bound on a kernel's time, from what its compiled code does and what it must move.

    tensor  = multiply-adds of its matrix instructions, padding included, x 2 / tensor rate
    memory  = bytes that it must read and write, each tensor once / bandwidth
    issue   = ceil(programs / SMs) x warps x issue slots of a warp / (4 slots a clock x clock)
    special = the same with special functions (exp, rsqrt, ...), each 8 clocks of a scheduler's unit
    time    = max(tensor, memory, issue, special)         share of the roofline = max(FLOP / rate, bytes / bw) / time

Left out: latency, too few bytes in flight, bank conflicts, cache misses beyond the first touch, the half rate of
integer and conversion instructions, launch overhead. Read a time as +-30 % and compare configurations of one kernel
with it; the ranking is more reliable than the number. Rates and limits are in gpu.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from pixelgen_kernels.launch import Launch
from pixelgen_kernels.report.compile import Compiled
from pixelgen_kernels.report.gpu import Device, Occupancy, occupancy

LIMITS = ("tensor", "memory", "issue", "special")


@dataclass(frozen=True)
class Estimate:
    """Modelled times in seconds; accessed: bytes that its load and store instructions touch, bulk copies left out."""

    tensor: float
    memory: float
    issue: float
    special: float
    ideal: float
    accessed: int
    executed_flops: int
    slots_per_row: float
    special_per_row: float
    occupancy: Occupancy

    @property
    def limits(self) -> dict[str, float]:
        """The time by each of LIMITS."""
        return {name: getattr(self, name) for name in LIMITS}

    @property
    def time(self) -> float:
        return max(self.limits.values())

    @property
    def limit(self) -> str:
        """The limit that binds."""
        return max(LIMITS, key=self.limits.__getitem__)

    @property
    def share(self) -> float:
        """Share of the roofline, 0 to 1."""
        return self.ideal / self.time if self.time else 1.0


def estimate(launch: Launch, compiled: Compiled, device: Device) -> Estimate:
    """Model a launch. Raises ValueError when it did not compile or was compiled for another architecture."""
    profile = compiled.profile
    if profile is None:
        raise ValueError(f"{launch.name} has no instruction profile: {compiled.error or 'not compiled for sm_90'}")
    all_warps = launch.grid * launch.num_warps
    rounds = -(-launch.grid // device.sms) * launch.num_warps / (device.issue_per_clock * device.clock)
    executed = 2 * profile.matrix * all_warps
    ideal_tensor, memory = launch.flops / device.tensor_rate, launch.bytes_moved / device.bandwidth
    return Estimate(
        tensor=max(executed, launch.flops) / device.tensor_rate,
        memory=memory,
        issue=rounds * profile.slots,
        special=rounds * profile.special * device.special_cycles,
        ideal=max(ideal_tensor, memory),
        accessed=sum(profile.access.values()) * all_warps,
        executed_flops=executed,
        slots_per_row=profile.slots * all_warps / launch.rows,
        special_per_row=32 * profile.special * all_warps / launch.rows,
        occupancy=occupancy(device, compiled.registers, compiled.shared, launch.num_warps),
    )
