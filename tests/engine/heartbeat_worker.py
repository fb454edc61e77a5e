"""A rank in miniature for test_heartbeat.py: meets the others and takes steps until something happens.

`python heartbeat_worker.py TASK FOLDER`: `work` goes on for ever; `stuck` and `fail` do so too but for rank 1, which
after sixty steps moves no more, or raises; `launch` starts a rank that works, as a launcher does, and waits for it.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from pixelgen_fast import errors
from pixelgen_fast.engine import group
from pixelgen_fast.engine.heartbeat import Heartbeat
from pixelgen_fast.signals import REQUEUE, StopRequest

LIMIT, PATIENCE = 2.0, 4.0


def take_step(task: str, rank: int, number: int, heart: Heartbeat) -> None:
    heart.step(number)
    heart.at("forward", patient=False)
    if rank == 1 and number == 60 and task == "stuck":
        time.sleep(600)
    if rank == 1 and number == 60 and task == "fail":
        raise ValueError("no image there")
    heart.at("backward", patient=False)
    if dist.get_world_size() > 1:
        dist.all_reduce(torch.ones(1))
    time.sleep(0.01)


def work(task: str, folder: Path) -> int:
    try:
        with Heartbeat(LIMIT, PATIENCE) as heart:
            rank, *_ = group.join(torch.device("cpu"), heart.store)
            errors.begin()
            number = 0
            with StopRequest() as stop:
                while not stop.requested:
                    number += 1
                    take_step(task, rank, number, heart)
                    if number == 50:
                        (folder / f"ready{rank}").touch()
            (folder / f"stopped{rank}").touch()
            return REQUEUE
    except Exception as error:
        print(errors.line(error), file=sys.stderr)
        return errors.exit_code(error)


if __name__ == "__main__":
    if sys.argv[1] == "launch":
        meeting = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "TORCHELASTIC_RUN_ID": "test"}
        sys.exit(subprocess.call([sys.executable, __file__, "work", sys.argv[2]], env=os.environ | meeting))
    sys.exit(work(sys.argv[1], Path(sys.argv[2])))
