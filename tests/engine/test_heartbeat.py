"""Ranks that are stopped, killed, stuck or failed, and orphans: what the others say, and that they end."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pixelgen_fast.engine.roll import START, Beat, Roll
from pixelgen_fast.errors import LOST

WORKER = Path(__file__).with_name("heartbeat_worker.py")
SECONDS = 100


class Ranks:
    """Worker processes that have met and taken some steps."""

    def __init__(self, folder: Path, task: str, world: int) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        base = os.environ | {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        own = [{"RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": str(world)} for r in range(world)]
        command = [sys.executable, str(WORKER), task, str(folder)]
        pipes = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        environments = [base | names for names in own] if task != "launch" else [base]
        self.folder = folder
        self.processes = [subprocess.Popen(command, env=env, **pipes) for env in environments]

    def wait_for(self, *names: str) -> None:
        end = time.monotonic() + SECONDS
        while not all((self.folder / name).exists() for name in names):
            assert time.monotonic() < end, "timed out"
            time.sleep(0.02)

    def end_of(self, rank: int) -> tuple[int, str]:
        """Exit code and last words of a rank that ends by itself."""
        said = self.processes[rank].communicate(timeout=SECONDS)[1]
        return self.processes[rank].returncode, said

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.communicate()


@pytest.fixture
def ranks(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Ranks]:
    started = Ranks(tmp_path, *request.param)
    yield started
    started.close()


@pytest.mark.parametrize("ranks", [("work", 2)], indirect=True)
@pytest.mark.parametrize(("number", "victim"), [(signal.SIGSTOP, 0), (signal.SIGKILL, 1)])
def test_a_rank_that_is_gone_is_named_with_what_it_did(ranks: Ranks, number: signal.Signals, victim: int) -> None:
    """Rank 0 keeps the store here, and is named all the same."""
    ranks.wait_for("ready0", "ready1")
    ranks.processes[victim].send_signal(number)
    code, said = ranks.end_of(1 - victim)
    assert code == LOST, said
    line = next(line for line in said.splitlines() if line.startswith("pixelgen: error:"))
    assert f"rank {victim} (" in line and f"process {ranks.processes[victim].pid})" in line and "last in step " in line


@pytest.mark.parametrize("ranks", [("stuck", 2)], indirect=True)
def test_the_rank_that_holds_up_the_others_is_named_by_all(ranks: Ranks) -> None:
    for rank in range(2):
        code, said = ranks.end_of(rank)
        assert code == LOST and "no rank gets on; rank 1 (" in said and "in step 60 (forward)" in said


@pytest.mark.parametrize("ranks", [("fail", 2)], indirect=True)
def test_an_error_of_one_rank_is_told_by_the_other(ranks: Ranks) -> None:
    assert ranks.end_of(0)[0] == LOST
    assert ranks.end_of(1)[0] not in (0, LOST)


@pytest.mark.parametrize("ranks", [("launch", 1)], indirect=True)
def test_an_orphan_saves_and_ends(ranks: Ranks) -> None:
    ranks.wait_for("ready0")
    ranks.processes[0].kill()
    ranks.wait_for("stopped0")


def beat(**changes: object) -> str:
    return json.dumps({**vars(Beat("node", 7, place="step 3 (forward)", allowed=20.0)), **changes})


def test_silence_counts_from_the_last_new_beat() -> None:
    roll = Roll(2, limit=10.0)
    for count, seconds in [(1, 3.0), (2, 3.0), (2, 6.0), (2, 6.0)]:
        roll.hear(0, beat(count=count), seconds)
    assert roll.silent(12.0) == "" and roll.peers[1].silent == 0
    assert roll.silent(10.0).startswith("rank 0 (node, process 7) has given no sign of life for 12 s, last in step 3")
    roll.hear(0, beat(count=2, ended=""), 3.0)
    assert roll.silent(10.0) == "" and not roll.all_ended(0) and roll.all_ended(1)
    roll.hear(1, None, START * 10.0 + 1)
    assert roll.silent(10.0) == "rank 1 has not come within 51 s"


def test_those_that_wait_for_another_are_not_to_blame() -> None:
    roll = Roll(3, limit=10.0)
    for seconds in (1.0, 15.0):
        for rank, position in enumerate((5, 4, 5)):
            roll.hear(rank, beat(count=int(seconds), position=position), seconds)
    assert roll.stuck() == ""  # it may take 20 s
    for rank, position in enumerate((5, 4, 5)):
        roll.hear(rank, beat(count=30, position=position, moves=rank == 2), 6.0)
    assert roll.stuck() == ""  # rank 2 gets on
    for rank, position in enumerate((5, 4, 5)):
        roll.hear(rank, beat(count=31, position=position, moves=rank == 2), 11.0)
    said = roll.stuck()
    assert said == "no rank gets on; rank 1 (node, process 7) is behind, for 32 s in step 3 (forward)"


def test_last_words_are_passed_on() -> None:
    roll = Roll(2, limit=10.0)
    roll.hear(1, beat(ended="OSError: gone"), 1.0)
    assert roll.failed() == "rank 1 (node, process 7) ended in step 3 (forward): OSError: gone"
