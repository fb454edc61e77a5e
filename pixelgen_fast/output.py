"""Printing that costs no work where nobody can take it: a full disk under a log file, a terminal or pipe that is gone.

What cannot be written is lost; the next line is tried again.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import Any, TextIO


class _Losable:
    """A text stream whose writing raises no OSError; everything else is the stream's own."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError):
            return self._stream.write(text)
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def losable_output() -> Iterator[None]:
    """Inside, printing raises no OSError; nor does what is left of it when the process ends, which Python would turn
    into an exit code of its own."""
    out, err = sys.stdout, sys.stderr  # None where a process was started without them
    try:
        with redirect_stdout(out and _Losable(out)), redirect_stderr(err and _Losable(err)):
            yield
    finally:
        for stream in (out, err):
            if stream is not None:
                _let_go(stream)


def _let_go(stream: TextIO) -> None:
    """Flush a stream, or drop what it holds where that fails."""
    try:
        stream.flush()
    except OSError:
        with suppress(OSError), open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), stream.fileno())
