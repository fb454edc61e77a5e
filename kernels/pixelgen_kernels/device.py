"""The GPU that the report judges for: limits that decide occupancy and ceilings that decide time.

    blocks per SM = min(by registers, by shared memory, by warp slots, by block slots)
    time          = max(FLOP / tensor rate, bytes / bandwidth, issue slots / issue rate, special functions / their rate)

Limits: CUDA C++ Programming Guide, table "Technical Specifications per Compute Capability" (9.0), and the occupancy
calculator of the CUDA toolkit for the allocation units. The two ceilings, 798 TFLOP/s of dense bf16 and 3.0 TB/s, are
what well-tuned kernels have been seen to reach on an H100 SXM, not the 989 TFLOP/s and 3.35 TB/s of its data sheet.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """Limits per SM unless named otherwise. Memory in bytes, rates per second."""

    name: str
    sms: int
    clock: float
    issue_per_clock: int
    tensor_rate: float
    bandwidth: float
    special_cycles: int  # clocks for which one warp's special function occupies its scheduler's unit
    registers: int
    register_unit: int  # registers are handed to a warp in multiples of this
    warp_unit: int  # and to warps in groups of this many, one for each scheduler
    shared: int
    shared_per_block: int
    shared_reserved: int  # taken by the system for each block
    shared_unit: int
    warps: int
    blocks: int


H100 = Device(
    name="H100 SXM",
    sms=132,
    clock=1.755e9,
    issue_per_clock=4,
    tensor_rate=798e12,
    bandwidth=3.0e12,
    special_cycles=8,
    registers=65536,
    register_unit=256,
    warp_unit=4,
    shared=228 * 1024,
    shared_per_block=227 * 1024,
    shared_reserved=1024,
    shared_unit=128,
    warps=64,
    blocks=32,
)

# Shared memory that one block may ask for on each architecture the kernels are compiled for, in bytes.
SHARED_PER_BLOCK = {80: 163 * 1024, 90: H100.shared_per_block, 100: 227 * 1024}


@dataclass(frozen=True)
class Occupancy:
    """Blocks that fit on one SM by each limit; `blocks` is the least, 0 when a block does not fit at all."""

    by_registers: int
    by_shared: int
    by_warps: int
    blocks: int
    share: float  # resident warps / warp slots
    limit: str


def occupancy(device: Device, registers: int, shared: int, num_warps: int) -> Occupancy:
    """registers: per thread, 1 to 255. shared: bytes per block without the system's part. num_warps: per block."""
    per_warp = _round_up(registers * 32, device.register_unit)
    warps_by_registers = device.registers // per_warp // device.warp_unit * device.warp_unit
    per_block = _round_up(shared + device.shared_reserved, device.shared_unit)
    limits = {
        "registers": warps_by_registers // num_warps,
        "shared memory": device.shared // per_block if shared <= device.shared_per_block else 0,
        "warps": min(device.warps // num_warps, device.blocks),
    }
    blocks = min(limits.values())
    binding = next(name for name, fits in limits.items() if fits == blocks)
    return Occupancy(
        limits["registers"], limits["shared memory"], limits["warps"],
        blocks, blocks * num_warps / device.warps, binding,
    )  # fmt: skip


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
