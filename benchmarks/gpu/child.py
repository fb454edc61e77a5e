"""The process of one measurement, started by visit.py:  python -m gpu.child '{"part": ..., "module": ..., ...}'"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

from gpu.visit import append


def main() -> None:
    spec = json.loads(sys.argv[1])

    def row(**values: Any) -> None:
        """Keep one row now. A row with `red` says what is wrong, one with `absent` what is not there to be measured."""
        append(Path(spec["rows"]), {"part": spec["part"], "task": spec["task"], **values})

    def device_free() -> None:
        """Wait until the device is ours."""
        if sys.stdin.readline() != "go\n":
            sys.exit("the visit ended before this measurement began")
        from machine import machine

        row(about=machine(device()))

    importlib.import_module(spec["module"]).measure(row, device_free, **spec["arguments"])


def device() -> str:
    """ "cuda" or "cpu", of this process."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


if __name__ == "__main__":
    main()
