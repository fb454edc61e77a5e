"""Tests under pytest, in parallel, with a row for each that fails and a count now and then: a run that is cut short
still says which were red."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable

WORD = "(PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)"
PARALLEL = re.compile(rf"\[gw\d+\] \[ *\d+%\] {WORD} (.+?)\s*$")
ALONE = re.compile(rf"()(\S+\.py::.+?) {WORD}\s*(\[ *\d+%\])?$")
OFTEN = 50  # tests from one row with the count to the next


def measure(
    row: Callable[..., None], device_free: Callable[[], None], select: list[str], workers: int, expected: int
) -> None:
    """select: arguments of pytest. expected: tests that must have run at least, or the row is red."""
    device_free()
    flags = ["-v", "--tb=short", "-n", str(workers), *(["--dist", "load"] if workers else [])]
    command = [sys.executable, "-m", "pytest", *flags, *select]
    count: Counter[str] = Counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as tests:
        for line in tests.stdout:
            print(line, end="")
            if (found := outcome(line)) is None:
                continue
            word, test = found
            count[word] += 1
            if word in ("FAILED", "ERROR"):
                row(red=f"{test} {word}")
            if sum(count.values()) % OFTEN == 0:
                row(count=dict(count))
    row(count=dict(count), code=tests.returncode)
    if tests.returncode not in (0, 1) or sum(count.values()) < expected:
        row(red=f"pytest ended with {tests.returncode} after {sum(count.values())} tests of {expected} at least")


def outcome(line: str) -> tuple[str, str] | None:
    """(PASSED, FAILED, ..., test) of a line of `pytest -v`, with or without workers; None of any other line."""
    if found := PARALLEL.match(line):
        return found[1], found[2]
    if found := ALONE.match(line):
        return found[3], found[2]
    return None
