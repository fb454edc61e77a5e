"""One run at a time writes a folder."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pixelgen_fast.errors import InputError
from pixelgen_fast.runs.owner import Owner

HOLD = """
import sys
from pathlib import Path
from pixelgen_fast.runs.owner import Owner
owner = Owner(Path(sys.argv[1])); owner.take(); print("held", flush=True); sys.stdin.read()
"""


def test_a_second_run_is_told_who_holds_the_folder_until_that_one_ends(tmp_path: Path) -> None:
    first, second = Owner(tmp_path / "run"), Owner(tmp_path / "run")
    first.take()
    with pytest.raises(InputError, match=f"run is in use by process {os.getpid()} on .* since 20"):
        second.take()
    first.close()
    second.take()
    second.close()


def test_a_killed_holder_holds_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(InputError, match=f"process {process.pid} "):
            Owner(tmp_path).take()
        process.send_signal(signal.SIGKILL)
    owner = Owner(tmp_path)
    owner.take()
    owner.close()
