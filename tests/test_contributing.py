"""CONTRIBUTING tells the truth: the tests, files and commands that it names are there."""

import re
import shlex
from pathlib import Path

import pytest

from pixelgen_fast import cli, commands

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
TESTS = sorted(set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", TEXT)))


@pytest.mark.parametrize(("path", "name"), TESTS)
def test_every_test_that_is_named_exists(path: str, name: str) -> None:
    assert re.search(rf"^def {name}\(", (ROOT / path).read_text(), re.MULTILINE)


def test_every_rule_names_its_test() -> None:
    rules = TEXT.partition("## The rules of the house")[2]
    lines = [line for line in rules.splitlines() if line.startswith("| ") and "held by" not in line]
    assert len(lines) > 10
    assert not [line for line in lines if not re.search(r"\| `tests/[\w/]+\.py::\w+` \|$", line)]


def test_paths_exist() -> None:
    named = re.findall(r"`((?:\.ci|kernels|csrc|pixelgen_fast|configs|benchmarks|tests)/[\w/.]*)`", TEXT)
    assert named
    assert [name for name in named if "NAME" not in name and not (ROOT / name).exists()] == []
    for script in re.findall(r"`python (benchmarks/\w+\.py)", TEXT):
        assert (ROOT / script).is_file(), script


def test_commands_parse() -> None:
    for command in re.findall(r"`pixelgen ([^`]*)`", TEXT):
        args, rest = cli._parser().parse_known_args(shlex.split(command))
        assert not rest or args.command is commands.kernels_report, command
