"""The ranks' exit code comes out of torchrun."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pixelgen_fast.launcher import first_code

ROOT = Path(__file__).parents[1]
RANK = """
import os, sys, time
from pixelgen_fast import launcher
from pixelgen_fast.signals import StopRequest
codes = sys.argv[1].split(",")
with StopRequest() as stop:
    sys.stdout.write("ready\\n")  # in one piece: two ranks write at once
    sys.stdout.flush()
    while sys.argv[2] == "wait" and not stop.requested:
        time.sleep(0.02)
code = int(codes[int(os.environ["RANK"])])
launcher.leave(code)
sys.exit(code)
"""


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A folder that makes the plug-in known as an installation does."""
    entry = re.search(r'"torchrun.handlers": \["(.*?)"\]', (ROOT / "setup.py").read_text())[1]
    about = tmp_path / "plugged-1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: plugged\nVersion: 1\n")
    (about / "entry_points.txt").write_text(f"[torchrun.handlers]\n{entry}\n")
    (tmp_path / "rank.py").write_text(RANK)
    return tmp_path


@pytest.mark.parametrize(
    ("codes", "expected"), [("75,75", 75), ("75,0", 75), ("0,2", 2), ("0,0", 0)], ids=["both", "one", "error", "none"]
)
def test_the_exit_code_of_the_ranks_is_that_of_torchrun(installed: Path, codes: str, expected: int) -> None:
    asked = codes == "75,75"
    paths = [str(installed), str(ROOT), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, str(installed / "rank.py"), codes, "wait" if asked else "go"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen(command, env=env, **pipes) as process:
        try:
            if asked:
                assert [process.stdout.readline() for _ in range(2)] == ["ready\n"] * 2
                process.send_signal(signal.SIGTERM)
            said = process.communicate(timeout=100)[1]
        finally:
            process.kill()
    assert process.returncode == expected, said


def test_the_first_code_of_the_last_attempt_counts() -> None:
    assert first_code("0 70\n0 69\n1 75\n1 69\n") == 75
    assert first_code("") == 0 and first_code("half a li") == 0
