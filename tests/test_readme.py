"""The README tells the truth: its commands parse, its files exist, its figures are those of the last evaluation."""

import re
import shlex
from pathlib import Path

import pytest

from pixelgen_fast import cli, commands

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()
VERBS = "train|plan|sample|evaluate|report|profile|demo|export|push|import|teacher|decoder|latents|compare|data|kernels"
COMMANDS = sorted(set(re.findall(rf"`([^`\n]*\bpixelgen(?:_fast)? (?:{VERBS}) [^`]*)`", TEXT)))


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_parse_and_name_files_that_exist(command: str) -> None:
    """They are run by tests/engine/test_trainer.py (every subcommand, both launchers) and by CI (the two lines)."""
    words = shlex.split(command)
    start = next(i for i, word in enumerate(words) if word in ("pixelgen", "pixelgen_fast"))
    args, rest = cli._parser().parse_known_args([w for w in words[start + 1 :] if "=" not in w])
    assert not rest or args.command is commands.kernels_report
    assert callable(args.command)
    for path in re.findall(r"configs/\S+\.yaml", command):
        assert (ROOT / path).is_file(), path


def test_paths_exist() -> None:
    for name in re.findall(r"`((?:kernels|pixelgen_fast|configs|benchmarks|tests)/[\w/.]*)`", TEXT):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"`(\w+\.yaml)`", TEXT):
        assert (ROOT / "configs" / name).is_file() or name == "config.yaml", name
    for name in re.findall(r"!\[[^]]*\]\(([^)]+)\)", TEXT):
        assert (ROOT / name).is_file(), name


def test_continuous_integration_runs_both_lines_of_the_readme() -> None:
    block = re.search(r"```bash\n(.*?)```", TEXT, re.DOTALL)[1].splitlines()
    assert [line.split()[-1] for line in block] == ["configs/digits.yaml", "pytest"]
    script = (ROOT / ".ci" / "run").read_text()
    assert "readme_line 1" in script and "readme_line 2" in script
