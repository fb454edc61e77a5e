"""Images per second of the data loader (benchmarks/loader.py), where DALI is installed."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from gpu.child import device
from gpu.visit import ROOT


def measure(row: Callable[..., None], device_free: Callable[[], None], arguments: list[str]) -> None:
    """arguments: of benchmarks/loader.py."""
    device_free()
    if importlib.util.find_spec("nvidia") is None or importlib.util.find_spec("nvidia.dali") is None:
        row(absent="DALI is not installed")
        return
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.jsonl"
        command = [sys.executable, str(ROOT / "benchmarks" / "loader.py"), f"--device={device()}", f"--out={out}"]
        subprocess.run([*command, *arguments], check=True)
        for line in out.read_text().splitlines():
            row(**json.loads(line))
