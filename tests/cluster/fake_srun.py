"""srun of a cluster that is this machine: FAKE_TASKS tasks as processes, and the highest of their exit codes.

Their process numbers are written to FAKE_PIDS, for a test to signal them as Slurm does.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

if __name__ == "__main__":
    command = sys.argv[1:]
    while command[0].startswith("--"):
        command.pop(0)
    count = os.environ["FAKE_TASKS"]
    steps = {"SLURM_STEP_NUM_TASKS": count, "SLURM_STEP_NUM_NODES": "1"}
    tasks = [
        subprocess.Popen(command, env=os.environ | steps | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)})
        for i in range(int(count))
    ]
    Path(os.environ["FAKE_PIDS"]).write_text(json.dumps([task.pid for task in tasks]))
    sys.exit(max(task.wait() for task in tasks))
