"""Hardware counters of our kernels by Nsight Compute, where it is installed: what a kernel waits for."""

from __future__ import annotations

import csv
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

METRICS = (
    "gpu__time_duration.sum",
    "dram__bytes.sum",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__issue_active.avg.pct_of_peak_sustained_elapsed",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed",
    "launch__registers_per_thread",
    "smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio",
    "smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio",
    "smsp__average_warps_issue_stalled_wait_per_issue_active.ratio",
)


def measure(row: Callable[..., None], device_free: Callable[[], None], model: str, images: int) -> None:
    """Every case of a model once. The clocks of the card stay as they are."""
    device_free()
    if shutil.which("ncu") is None:
        row(absent="ncu is not installed")
        return
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "ncu.csv"
        flags = ["--clock-control", "none", "--metrics", ",".join(METRICS), "--csv", "--log-file", str(log)]
        command = ["ncu", *flags, "-k", "regex:_(fwd|bwd)_kernel|sum_partials_kernel", sys.executable]
        done = subprocess.run([*command, "-m", "gpu.launch_times", model, str(images)])
        text = log.read_text() if log.exists() else ""
    print(text[-2000:])
    found = kernels(text.splitlines())
    for kernel in found:
        row(model=model, **kernel)
    if done.returncode or not found:
        row(red=f"ncu ended with {done.returncode} and {len(found)} kernels")


def kernels(lines: Iterable[str]) -> list[dict]:
    """{"kernel", a metric: value with its unit, ...} of every launch in ncu's CSV, in the order of starting."""
    table = [line for line in lines if line.startswith('"')]
    found: dict[str, dict] = {}
    for entry in csv.DictReader(table):
        kernel = found.setdefault(entry["ID"], {"kernel": entry["Kernel Name"]})
        kernel[entry["Metric Name"]] = f"{entry['Metric Value']} {entry['Metric Unit']}".strip()
    return list(found.values())
