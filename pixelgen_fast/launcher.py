"""torchrun's exit code, made that of its ranks.

torchrun answers 1 whatever its ranks said, and a script that puts a stopped run back into the queue asks for 75. In its
own process torchrun loads plug-ins of the group `torchrun.handlers`, where setup.py enters this one. It names a file to
the ranks, each leaves its exit code there, and a torchrun that ends with an error ends with the code that came first in
the last attempt. Ranks of other programs leave nothing, and torchrun then ends as ever.

The file: a line "<attempt> <exit code>" of each rank that did not end with 0.
"""

from __future__ import annotations

import atexit
import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import NoReturn

FILE = "PIXELGEN_EXIT_CODES"
_ATTEMPT = "TORCHELASTIC_RESTART_COUNT"


def leave(code: int) -> None:
    """Tell the launcher, where there is one, the exit code of this rank. Raises nothing."""
    path = os.environ.get(FILE)
    if path and code:
        with suppress(OSError), open(path, "a") as file:
            file.write(f"{os.environ.get(_ATTEMPT, '0')} {code}\n")


def plug_in() -> Callable[[object], NoReturn]:
    """What torchrun calls. The rendezvous that it asks for is none, and nobody names it."""
    if _in_torchrun():
        handle, path = tempfile.mkstemp(prefix="pixelgen-exit-codes-")
        os.close(handle)
        os.environ[FILE] = path
        failed: list[BaseException] = []
        shown = sys.excepthook

        def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
            failed.append(error)
            shown(kind, error, trace)

        sys.excepthook = hook
        atexit.register(_end, Path(path), failed)
    return _no_rendezvous


def first_code(text: str) -> int:
    """The code that came first in the last attempt; 0 where there is none."""
    codes: dict[int, int] = {}
    for line in text.splitlines():
        with suppress(ValueError):
            attempt, code = map(int, line.split())
            codes.setdefault(attempt, code)
    return codes[max(codes)] if codes else 0


def _in_torchrun() -> bool:
    """Other programs that import torch's launcher are left alone."""
    spec = sys.modules["__main__"].__spec__
    return Path(sys.argv[0]).name == "torchrun" or (spec is not None and spec.name == "torch.distributed.run")


def _end(path: Path, failed: list[BaseException]) -> None:
    code = 0
    with suppress(OSError):
        code = first_code(path.read_text())
        path.unlink()
    if failed and code:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _no_rendezvous(parameters: object) -> NoReturn:
    raise ValueError("pixelgen is no rendezvous backend: leave out --rdzv-backend, or give c10d")
