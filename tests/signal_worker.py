"""A training loop in miniature for test_signals.py: says `ready`, works until it is told to stop, saves, exits.

`python signal_worker.py TASK`: `obey` stops when asked; `linger` says that it was asked and works on; `children` first
reports what a forked child does with SIGTERM, and whether children started with and without a shield ignore SIGINT.
"""

import os
import signal
import subprocess
import sys
import time

from pixelgen_fast.data.readers import signals_withheld
from pixelgen_fast.engine.collectives import any_rank
from pixelgen_fast.signals import REQUEUE, StopRequest

IGNORES = "import signal; print(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, []))"


def forked_child_ends_by() -> str:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, b".")
        time.sleep(60)
        os._exit(0)
    os.read(reader, 1)
    os.kill(child, signal.SIGTERM)
    return signal.Signals(os.WTERMSIG(os.waitpid(child, 0)[1])).name


def started_child_ignores_interrupts() -> str:
    return subprocess.run([sys.executable, "-c", IGNORES], capture_output=True, text=True, check=True).stdout.strip()


def main(task: str) -> int:
    with StopRequest() as stop:
        if task == "children":
            with signals_withheld():
                inside = started_child_ignores_interrupts()
            print(forked_child_ends_by(), inside, started_child_ignores_interrupts(), flush=True)
        print("ready", flush=True)
        while not any_rank([stop.requested])[0]:
            time.sleep(0.02)
        if task == "linger":
            print("asked", flush=True)
            time.sleep(60)
        print(f"saved after {stop.name}", flush=True)
    return REQUEUE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
