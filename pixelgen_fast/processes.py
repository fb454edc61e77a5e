"""Which process of a run this one is, from whatever started it: nothing, a launcher, Kubernetes or srun.

torchrun, deepspeed       RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT: taken as they are
Kubernetes                the same without LOCAL_RANK: one process a machine, LOCAL_RANK is 0
srun, several tasks       named after SLURM_PROCID, SLURM_STEP_NUM_TASKS, SLURM_LOCALID
none of them              one process
"""

from __future__ import annotations

import itertools
import os
import sys
import threading
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path

from pixelgen_fast.errors import InputError

NAMES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
WAITS_OUTSIDE = "waits outside of Python"  # name of the threads that may


def join(environment: MutableMapping[str, str]) -> str:
    """Complete the variables that PyTorch and DeepSpeed read. Returns what to say of it, nothing where it is plain.

    Raises InputError where they do not say enough.
    """
    if "RANK" not in environment:
        return _join_slurm(environment) if world_size(environment) > 1 else ""
    if missing := [name for name in NAMES if name not in environment]:
        raise InputError(
            f"RANK is {environment['RANK']} in the environment but {', '.join(missing)} not: set them as well, or "
            "unset RANK for a run of one process"
        )
    environment.setdefault("LOCAL_RANK", environment.get("SLURM_LOCALID", "0"))
    return ""


def world_size(environment: MutableMapping[str, str]) -> int:
    """How many processes were started to work together."""
    if "RANK" in environment:
        return int(environment.get("WORLD_SIZE", "1"))
    return int(environment.get("SLURM_STEP_NUM_TASKS", "1"))


def lineage(environment: Mapping[str, str]) -> list[int]:
    """This process, its parent and so on to the launcher that a person started; empty where it needs none to live on.

    DeepSpeed puts a process of its own between the two.
    """
    generations = 1 if "TORCHELASTIC_RUN_ID" in environment else 2 if "CROSS_RANK" in environment else 0
    found = [os.getpid()] if generations else []
    for _ in range(generations):
        found.append(_parent(found[-1]))
    return found


def orphaned(family: Sequence[int]) -> bool:
    """Whether one of a lineage has died: its child then has another parent."""
    return any(_parent(child) != parent for child, parent in itertools.pairwise(family))


def _parent(process: int) -> int:
    """The parent of a process; 0 for a process that is gone."""
    try:
        about = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return 0
    return int(about.rpartition(")")[2].split()[1])  # a name in parentheses comes before, and may hold anything


def _join_slurm(environment: MutableMapping[str, str]) -> str:
    tasks = environment["SLURM_STEP_NUM_TASKS"]
    if int(environment.get("SLURM_STEP_NUM_NODES", "1")) > 1 and "MASTER_ADDR" not in environment:
        raise InputError(
            f"srun started {tasks} tasks on several machines and MASTER_ADDR is not set: before srun, export "
            'MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)'
        )
    environment["RANK"], environment["WORLD_SIZE"] = environment["SLURM_PROCID"], tasks
    environment["LOCAL_RANK"] = environment.get("SLURM_LOCALID", "0")
    environment.setdefault("MASTER_ADDR", "127.0.0.1")
    # another port for each job, since jobs may share a machine
    environment.setdefault("MASTER_PORT", str(20_000 + int(environment.get("SLURM_JOB_ID", "0")) % 20_000))
    return f"the {tasks} tasks of srun (SLURM_STEP_NUM_TASKS) are the ranks of one run"


def end_if_a_thread_waits(code: int) -> None:
    """End this process at once where a thread of it still waits in a library, for a store that does not answer.

    Python ends such a thread when it comes back while the interpreter is taken down, and C++ then aborts the process,
    whose exit code is lost.
    """
    if any(thread.name == WAITS_OUTSIDE for thread in threading.enumerate()):
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.flush()
        os._exit(code)
