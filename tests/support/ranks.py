"""The worker script of the multi-process tests, as a module and as one or two ranks of a launcher."""

import importlib.util
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

WORKER = Path(__file__).parents[1] / "engine" / "zero_worker.py"
LIMIT_SECONDS = 150


@pytest.fixture(scope="session")
def worker() -> ModuleType:
    """zero_worker.py, for its model and constants."""
    spec = importlib.util.spec_from_file_location("zero_worker", WORKER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def launch() -> Callable[[str, int, Path], None]:
    """launch(task, world, folder): all ranks must exit with 0. One rank gets no launcher's environment."""

    def run(task: str, world: int, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        base = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        ranks = []
        for rank in range(world):
            own = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
            env = base | ({key: str(value) for key, value in own.items()} if world > 1 else {})
            command = [sys.executable, str(WORKER), task, str(folder)]
            pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            ranks.append(subprocess.Popen(command, env=env, **pipes))
        try:
            said = [process.communicate(timeout=LIMIT_SECONDS)[0] for process in ranks]
        finally:
            for process in ranks:
                process.kill()
        codes = [process.returncode for process in ranks]
        assert codes == [0] * world, "\n".join(f"rank {r}: exit {codes[r]}\n{text}" for r, text in enumerate(said))

    return run


def start_ranks(arguments: list[str], world: int = 1) -> list[subprocess.Popen]:
    """`pixelgen ARGUMENTS` as ranks of a launcher; what they say is in their pipes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        meeting = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    command = [sys.executable, "-m", "pixelgen_fast", *arguments]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    base = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"} | meeting
    return [subprocess.Popen(command, env=base | {"RANK": str(r), "LOCAL_RANK": str(r)}, **pipes) for r in range(world)]
