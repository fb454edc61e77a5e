"""What a measured figure is worth nothing without: the machine, the versions, the commit; and where rows are kept."""

from __future__ import annotations

import json
import os
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import triton

RESULTS = Path(__file__).parent / "results"
CARRIED = Path(__file__).parents[1] / ".gpu" / "commit"  # of a copy that is no repository (gpu/wheels.py)
COMMIT = "PIXELGEN_COMMIT"  # what is measured, where a visit knows it better than the folder


def machine(device: str = "cpu") -> dict[str, str]:
    """Date, processor or GPU with its threads, system, versions, commit."""
    name = torch.cuda.get_device_name() if device == "cuda" else _processor()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{name}, {torch.get_num_threads()} threads" if device == "cpu" else name,
        "system": platform.platform(), "python": platform.python_version(), "torch": torch.__version__,
        "triton": triton.__version__, "commit": _commit(),
    }  # fmt: skip


def append(file: Path, row: dict[str, Any]) -> None:
    """Add one row to a JSONL file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as out:
        out.write(json.dumps(row) + "\n")


def seconds(call: Callable[[], Any]) -> float:
    """Wall-clock seconds of one call on the host."""
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def spread(values: Iterable[float]) -> tuple[float, float, float]:
    """(20th percentile, median, 80th percentile)."""
    values = sorted(values)
    fifths = statistics.quantiles(values, n=5, method="inclusive") if len(values) > 1 else [values[0]] * 4
    return fifths[0], statistics.median(values), fifths[3]


def _commit() -> str:
    if name := os.environ.get(COMMIT):
        return name
    if shutil.which("git"):
        found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=RESULTS.parent)
        if found.returncode == 0:
            return found.stdout.strip()
    return CARRIED.read_text().strip() if CARRIED.exists() else "unknown"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), platform.processor())
