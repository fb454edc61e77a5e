"""pixelgen plan: what a configuration needs on GPUs that need not be there.

configuration, machine -> traced step -> estimate -> table, JSON, page
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from pixelgen_kernels.bodies import VARIABLE

from pixelgen_fast import config as cfg
from pixelgen_fast import models
from pixelgen_fast.atomic import replaced
from pixelgen_fast.errors import InputError
from pixelgen_fast.planning.cards import find_card
from pixelgen_fast.planning.changes import helpful
from pixelgen_fast.planning.communication import ring_rate
from pixelgen_fast.planning.estimate import CASES, Estimate, Machine
from pixelgen_fast.planning.page import write_page
from pixelgen_fast.planning.step import trace_step
from pixelgen_fast.planning.text import as_data, as_text

NODE = 8  # GPUs of a node, where nothing is said


def run(args: argparse.Namespace) -> int:
    """Print the plan that the arguments ask for, and write it as JSON and as a page.

    Raises InputError, in one line, for a card, a number of GPUs or a configuration that no run could have.
    """
    config = cfg.load(args.config, args.overrides, models.model_schema)
    for option in ("json", "html"):
        if (out := getattr(args, option)) and Path(out).is_dir():
            raise InputError(f"--{option} {out} is a folder; name a file")
    found = estimate(config, args.gpu, args.gpus, args.nodes)
    changes = helpful(found)
    print(as_text(found, changes))
    if args.json:
        with replaced(Path(args.json)) as work:
            work.write_text(json.dumps(as_data(found, changes), indent=1) + "\n")
    if args.html:
        write_page(found, changes, Path(args.config).stem, Path(args.html))
        print(f"\nwrote {args.html}")
    return 0


def estimate(config: cfg.Config, gpu: str, gpus: int, nodes: int | None = None, memory: bool = True) -> Estimate:
    """The plan of a configuration. nodes: None for nodes of eight GPUs. memory: as `trace_step` takes it.

    Raises InputError as `run` does.
    """
    if gpus < 1:
        raise InputError(f"--gpus is {gpus}; it must be at least 1")
    if nodes is None:
        nodes = -(-gpus // NODE)
    if nodes < 1 or gpus % nodes:
        raise InputError(f"--nodes is {nodes}; it must be at least 1 and divide --gpus {gpus}")
    t = config.train
    if t.precision == "fp32" or config.run.device == "cpu":
        key, value = ("train.precision", "bf16") if t.precision == "fp32" else ("run.device", "cuda")
        raise InputError(f"the plan is of bf16 runs on GPUs, and this is none; add {key}={value}")
    if os.environ.get(VARIABLE) == "native":
        raise InputError(f"the plan is of GPUs, and {VARIABLE} is native, whose operators run on a CPU; unset it")
    machine = Machine(find_card(gpu), gpus, nodes)
    cfg.check_world(config, gpus)
    ring_rate(machine.card, gpus, nodes)
    return Estimate(trace_step(config, gpus, memory), machine)


def usual_gpus(config: cfg.Config) -> int:
    """GPUs of one node that take a step of a configuration: as many as it has micro-batches, at most eight."""
    micro = config.train.global_batch // config.train.micro_batch
    return max(n for n in range(1, min(NODE, micro) + 1) if micro % n == 0)


def hours_line(config: cfg.Config) -> str:
    """The hours of a run on H100s, in one line, for `--dry-run`."""
    gpus = usual_gpus(config)
    found = estimate(config, "h100", gpus, memory=False)
    floor, planned, slow = (found.hours(case, config.train.images) for case in CASES)
    return (
        f"hours              {planned:.1f} planned on {gpus} H100, {floor:.1f} at the floor, {slow:.1f} pessimistic; "
        "modelled (pixelgen plan)"
    )
