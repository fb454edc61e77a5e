"""Which process of a run this one is."""

import os
import subprocess
import sys

import pytest

from pixelgen_fast.cli import main
from pixelgen_fast.errors import InputError
from pixelgen_fast.processes import join, lineage, orphaned, world_size

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "host", "MASTER_PORT": "29500"}
SRUN = {"SLURM_JOB_ID": "40007", "SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "2"}


def joined(environment: dict[str, str]) -> dict[str, str]:
    environment = dict(environment)
    said = join(environment)
    assert ("tasks of srun" in said) == ("RANK" in environment and environment.get("SLURM_STEP_NUM_TASKS") == "2")
    return environment


def test_a_launcher_is_taken_at_its_word() -> None:
    assert joined(TORCHRUN) == TORCHRUN and world_size(TORCHRUN) == 4
    assert joined({}) == {} and world_size({}) == 1


def test_kubernetes_does_not_name_the_local_rank() -> None:
    environment = {name: value for name, value in TORCHRUN.items() if name != "LOCAL_RANK"}
    assert joined(environment) == TORCHRUN | {"LOCAL_RANK": "0"}


def test_tasks_of_srun_are_ranks_of_one_run() -> None:
    found = joined(SRUN)
    assert [found[name] for name in TORCHRUN] == ["1", "2", "1", "127.0.0.1", "20007"]
    assert world_size(SRUN) == 2


def test_a_task_of_srun_alone_is_a_run_of_one_process() -> None:
    assert joined(SRUN | {"SLURM_STEP_NUM_TASKS": "1"}).keys() == SRUN.keys()
    assert joined({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}).keys() == {"SLURM_NTASKS", "SLURM_PROCID"}  # sbatch's own


def test_several_machines_need_a_name_to_meet_at() -> None:
    with pytest.raises(InputError, match="MASTER_ADDR=.*scontrol"):
        joined(SRUN | {"SLURM_STEP_NUM_NODES": "2"})
    assert joined(SRUN | {"SLURM_STEP_NUM_NODES": "2", "MASTER_ADDR": "a"})["MASTER_ADDR"] == "a"


def test_a_rank_that_is_left_over_is_refused() -> None:
    with pytest.raises(InputError, match="RANK is 0 .* WORLD_SIZE, MASTER_ADDR, MASTER_PORT not"):
        joined({"RANK": "0"})


def test_what_works_in_one_process_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    assert main(["export", "run", "out"]) == 2
    assert "4 processes were started" in capsys.readouterr().err


def test_a_rank_lives_on_its_launcher_and_a_run_of_one_process_on_nobody() -> None:
    assert lineage({}) == [] and not orphaned([])
    assert lineage({"TORCHELASTIC_RUN_ID": "7"}) == [os.getpid(), os.getppid()]
    family = lineage({"CROSS_RANK": "0"})  # deepspeed, its process on this machine, this process
    assert family[:2] == [os.getpid(), os.getppid()] and len(family) == 3
    assert not orphaned(family) and orphaned([os.getpid(), os.getpid()])


WAITING = """
import sys, threading, time
from pixelgen_fast import processes
def wait(): time.sleep(60)
threading.Thread(target=wait, name=processes.WAITS_OUTSIDE if sys.argv[1] == "outside" else "own").start()
print("said", end="")
processes.end_if_a_thread_waits(75)
"""


@pytest.mark.parametrize("who", ["outside", "own"])
def test_a_thread_that_waits_for_a_store_takes_no_exit_code_away(who: str) -> None:
    process = subprocess.Popen([sys.executable, "-c", WAITING, who], stdout=subprocess.PIPE, text=True)
    if who == "outside":
        assert process.communicate(timeout=50)[0] == "said" and process.returncode == 75
    else:
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(2)
    process.kill()
    process.communicate()
