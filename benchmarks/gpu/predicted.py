"""The report's time of every launch beside the measured one:  ratio = measured / modelled."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from operators import cases
from pixelgen_kernels.registry import OPERATORS
from pixelgen_kernels.shapes import MODELS

from gpu.child import device
from gpu.launch_times import launch_times, prepared


def modelled(model: str, operators: list[str]) -> list[dict]:
    """Rows of the report, which compiles for sm_90: in a process of its own, where kernels are not interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "report.json"
        flags = ["--models", model, "--ops", ",".join(operators), "--jobs", str(os.cpu_count()), "--json", str(out)]
        command = [sys.executable, "-m", "pixelgen_kernels.report", *flags]
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
        return json.loads(out.read_text())["rows"]


def measure(
    row: Callable[..., None], device_free: Callable[[], None], model: str, images: int, rounds: int,
    operators: list[str] | None = None,
) -> None:  # fmt: skip
    names = operators or list(OPERATORS)
    rows = modelled(model, names)
    device_free()
    shape = MODELS[model].with_batch(images)
    took: dict[tuple[str, str], list[float]] = defaultdict(list)
    for named in (OPERATORS[name] for name in names):
        for case, operator in cases(named).items():
            if case in shape.cases:
                call = prepared(operator, shape, device())
                call()
                for _ in range(rounds):
                    for launch, us in launch_times(call, device()):
                        took[case, launch.name].append(us)
    for found in rows:
        case, launch = found["case"], found["launch"]
        about = {"model": model, "case": case, "launch": launch["name"]}
        if (case, launch["name"]) not in took or found["modelled"] is None:
            row(**about, red=f"{model} {case} {launch['name']} was not started or has no modelled time")
            continue
        measured, time = statistics.median(took[case, launch["name"]]), 1e6 * found["modelled"]["time"]
        row(
            **about, modelled_us=time, measured_us=measured, ratio=measured / time,
            limit=found["modelled"]["limit"], tb_per_s=launch["bytes"] / measured / 1e6,
            tflop_per_s=launch["flops"] / measured / 1e6,
        )  # fmt: skip
