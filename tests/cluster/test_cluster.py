"""Runs on several machines: the batch scripts with a Slurm of one machine, two launchers that meet, and what installs.

srun and scontrol are stand-ins on PATH; bash, torchrun, DeepSpeed's launcher and the ranks are real.
"""

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from support.runs import newest, train

from pixelgen_fast.runs.checkpoint import read_weights
from pixelgen_fast.runs.folder import RunFolder
from tests import lock

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "configs" / "cluster"
README = (ROOT / "README.md").read_text()
OWN = ("model.patch_depth=1", "optimizer.warmup_images=0")
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PIXELGEN_PYTHON": sys.executable}
IMAGES = 48


def free_port(low: int, high: int) -> int:
    while True:
        port = random.randrange(low, high)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port


class Slurm:
    """A job: its script is started as Slurm starts it, with stand-ins for srun and scontrol on PATH."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log, self.pids = folder, folder / "scontrol.log", folder / "pids.json"
        (folder / "bin").mkdir()
        fake = Path(__file__).with_name("fake_srun.py")
        self.put("srun", f'exec {sys.executable} {fake} "$@"')
        self.put("scontrol", f'if [ "$1" = show ]; then echo 127.0.0.1; else echo "$@" >> {self.log}; fi')

    def put(self, name: str, line: str) -> None:
        path = self.folder / "bin" / name
        path.write_text(f"#!/usr/bin/env bash\n{line}\n")
        path.chmod(0o755)

    def start(self, script: str, *arguments: str, tasks: int = 2) -> subprocess.Popen:
        job = {"SLURM_JOB_ID": str(free_port(20_000, 32_000) - 20_000), "SLURM_JOB_NODELIST": "node[1-2]"}
        job |= {"SLURM_JOB_NUM_NODES": str(tasks), "SLURM_GPUS_ON_NODE": "1"}
        fake = {
            "FAKE_TASKS": str(tasks),
            "FAKE_PIDS": str(self.pids),
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
        }
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)
        env = os.environ | ENVIRONMENT | job | fake
        return subprocess.Popen(["bash", str(CLUSTER / script), *arguments], env=env, **pipes)

    @property
    def requeued(self) -> int:
        return len(self.log.read_text().splitlines()) if self.log.exists() else 0


@pytest.fixture
def slurm(tmp_path: Path) -> Slurm:
    return Slurm(tmp_path)


def arguments(folder: Path, images: int = IMAGES) -> list[str]:
    return train(folder, images, *OWN)[1:]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {
        f"{kind} {name}": v for kind in ("raw", "ema_0.999") for name, v in read_weights(newest(folder), kind).items()
    }


def ends(*processes: subprocess.Popen) -> list[str]:
    """What the processes said; each must end with 0."""
    said = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(said)
    return said


@pytest.fixture(scope="module")
def one_launcher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks of one torchrun, which the others must equal."""
    folder = tmp_path_factory.mktemp("one") / "run"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "-m", "pixelgen_fast", "train", *arguments(folder)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    ends(subprocess.Popen(command, env=os.environ | ENVIRONMENT, **pipes))
    return folder


def assert_same(found: Path, wanted: Path) -> None:
    expected = weights(wanted)
    for name, value in weights(found).items():
        torch.testing.assert_close(value, expected[name], atol=1e-5, rtol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


def test_a_job_whose_time_is_over_goes_back_into_the_queue(slurm: Slurm, tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    job = slurm.start("train.sbatch", *arguments(run.root, 200_000))
    end = time.monotonic() + 200
    while not (run.metrics.exists() and run.metrics.read_text()):
        assert job.poll() is None, job.communicate()[0]
        assert time.monotonic() < end, "no step in 200 s"
        time.sleep(0.2)
    for pid in json.loads(slurm.pids.read_text()):
        os.kill(pid, signal.SIGUSR1)
    said = job.communicate(timeout=120)[0]
    assert job.returncode == 75, said
    assert "the 2 tasks of srun (SLURM_STEP_NUM_TASKS) are the ranks of one run" in said
    assert "saved; the same command goes on from here" in said
    assert slurm.requeued == 1
    assert slurm.log.read_text().startswith("requeue ")

    nimg = int(newest(run.root).name)
    again = slurm.start("train.sbatch", *arguments(run.root, nimg + 32))
    assert f"image {nimg:,} of" in ends(again)[0]
    assert slurm.requeued == 1, "a run that is done stays done"


@pytest.mark.parametrize("script", ["train.sbatch", "train_torchrun.sbatch"])
def test_an_error_to_mend_ends_the_job(slurm: Slurm, script: str) -> None:
    job = slurm.start(script, tasks=1)
    assert "usage: sbatch configs/cluster/" in job.communicate(timeout=60)[0]
    assert job.returncode == 2
    slurm.put("srun", "exit 69")
    job = slurm.start(script, "configs/digits.yaml", tasks=1)
    job.communicate(timeout=60)
    assert (job.returncode, slurm.requeued) == (69, 0)
    slurm.put("srun", "exit 75")
    job = slurm.start(script, "configs/digits.yaml", tasks=1)
    job.communicate(timeout=60)
    assert (job.returncode, slurm.requeued) == (75, 1)


def test_two_torchruns_that_meet_train_the_same(slurm: Slurm, one_launcher: Path, tmp_path: Path) -> None:
    """One on each machine, by the batch script."""
    ends(slurm.start("train_torchrun.sbatch", *arguments(tmp_path / "run")))
    assert_same(tmp_path / "run", one_launcher)


def test_two_launchers_of_deepspeed_with_a_hostfile_train_the_same(one_launcher: Path, tmp_path: Path) -> None:
    """One on each machine, without ssh."""
    hosts = tmp_path / "hostfile"
    hosts.write_text("node1 slots=1\nnode2 slots=1\n")
    common = ["--hostfile", str(hosts), "--no_ssh", "--master_addr", "127.0.0.1", "--module"]
    port = ["--master_port", str(free_port(20_000, 32_000))]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", *port]
    program = [*common, "pixelgen_fast", "train", *arguments(tmp_path / "run")]
    commands = [[*launcher, "--node_rank", str(i), *program] for i in range(2)]
    ends(*(subprocess.Popen(command, env=os.environ | ENVIRONMENT, **pipes) for command in commands))
    assert_same(tmp_path / "run", one_launcher)


def test_the_hostfile_is_one() -> None:
    """By DeepSpeed's own reading."""
    from deepspeed.launcher.runner import fetch_hostfile

    assert fetch_hostfile(str(CLUSTER / "hostfile")) == {"node1": 4, "node2": 4}


@pytest.mark.parametrize("script", ["train.sbatch", "train_torchrun.sbatch"])
def test_what_a_script_says_of_itself_is_there(script: str) -> None:
    text = (CLUSTER / script).read_text()
    assert f"sbatch configs/cluster/{script} configs/imagenet256_38ep.yaml" in text
    options = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", text, re.MULTILINE))
    assert {"requeue", "signal", "open-mode", "time", "nodes"} <= options.keys()
    assert not subprocess.run(["bash", "-n", str(CLUSTER / script)]).returncode


def first_line() -> str:
    return re.search(r"```bash\n(.*?)\n", README)[1]


def test_the_container_is_made_by_the_first_line_of_the_readme() -> None:
    install, _, job = first_line().rpartition(" && ")
    assert job.endswith("pixelgen train configs/digits.yaml")
    assert f"\nRUN {install}\n" in (CLUSTER / "Dockerfile").read_text()


def pins() -> dict[str, str]:
    lines = [line for line in lock.LOCK.read_text().splitlines() if not line.startswith("#")]
    return dict(re.fullmatch(r"([a-z0-9.-]+)==([\w.!]+)", line).groups() for line in lines)


def test_the_lock_has_all_that_setup_asks_for() -> None:
    """Each requirement of the extras that it names is pinned, to a version that the requirement allows."""
    pinned = pins()
    for requirement in lock.wanted():
        if requirement.marker is None or requirement.marker.evaluate():
            name = lock.canonicalize_name(requirement.name)
            assert requirement.specifier.contains(pinned[name]), f"{requirement} against {pinned[name]}"
    assert not Requirement("torch>=99").specifier.contains(pinned["torch"])


def test_the_line_that_installs_the_lock_is_that_of_the_readme() -> None:
    assert f"```bash\n{lock.LINE}\n```" in README
    assert f"#   {lock.LINE}\n" in lock.LOCK.read_text()
    assert ", ".join(lock.EXTRAS) in lock.LOCK.read_text()
