"""The GPU that the report judges for: limits that decide occupancy and ceilings that decide time.

    blocks per SM = min(by registers, by shared memory, by warp slots, by block slots)
    time          = max(FLOP / tensor rate, bytes / bandwidth, issue slots / issue rate, special functions / their rate)

Limits: CUDA C++ Programming Guide, table "Technical Specifications per Compute Capability" (9.0), and the occupancy
calculator of the CUDA toolkit for the allocation units. The two ceilings, 798 TFLOP/s of dense bf16 and 3.0 TB/s, are
what well-tuned kernels have been seen to reach on an H100 SXM, not the 989 TFLOP/s and 3.35 TB/s of its data sheet.
`with_ceilings` takes measured ones instead.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path


@dataclass(frozen=True)
class Device:
    """Limits per SM unless named otherwise. Memory in bytes, rates per second. ceilings: where the two come from."""

    name: str
    ceilings: str
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
    ceilings="seen elsewhere",
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


def with_ceilings(device: Device, path: Path) -> Device:
    """The device with ceilings that were measured: JSON with tflop_per_s, tb_per_s and, for the reader, gpu.

    Raises ValueError, naming the file, when it is not there, is no such JSON or holds what is no rate.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: no readable JSON file of ceilings ({error})") from error
    values = [content.get(key) if isinstance(content, dict) else None for key in ("tflop_per_s", "tb_per_s")]
    if not all(type(x) in (int, float) and 0 < x < float("inf") for x in values):
        raise ValueError(
            f"{path}: ceilings need tflop_per_s and tb_per_s, numbers above 0, got {values[0]!r} and {values[1]!r}; "
            "python benchmarks/gpu_day.py measures them on a GPU"
        )
    where = f"measured on {content.get('gpu', 'a GPU that it does not name')}, {path.name}"
    return replace(device, tensor_rate=values[0] * 1e12, bandwidth=values[1] * 1e12, ceilings=where)


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
