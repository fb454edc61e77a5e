"""A run whose output goes where nothing more fits."""

import subprocess
import sys
from pathlib import Path

import pytest
from support.runs import train

from pixelgen_fast.output import losable_output

COMMAND = "import sys; from pixelgen_fast.cli import main; sys.exit(main(sys.argv[1:]))"


def test_a_run_whose_output_nobody_takes_ends_well(tmp_path: Path) -> None:
    arguments = train(tmp_path / "run", 32, "optimizer.warmup_images=0", "model.patch_depth=1")
    with open("/dev/full", "w") as full:
        ended = subprocess.run([sys.executable, "-c", COMMAND, *arguments], stdout=full, stderr=full, check=False)
    assert ended.returncode == 0
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2


def test_an_error_keeps_its_code_where_its_line_is_lost() -> None:
    with open("/dev/full", "w") as full:
        ended = subprocess.run(
            [sys.executable, "-c", COMMAND, "train", "no.yaml"], stdout=full, stderr=full, check=False
        )
    assert ended.returncode == 2


def test_what_can_be_written_is(capsys: pytest.CaptureFixture) -> None:
    with losable_output():
        print("a line")
        print("another", file=sys.stderr)
        sys.stdout.writelines(["x", "y"])
    assert capsys.readouterr() == ("a line\nxy", "another\n")


def test_a_process_without_output_works() -> None:
    code = "import sys; sys.stdout = sys.stderr = None; " + COMMAND.removeprefix("import sys; ")
    assert subprocess.run([sys.executable, "-c", code, "train", "no.yaml"], check=False).returncode == 2
