"""Files that are replaced whole: a reader sees the old one or the new one, never half of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replaced(target: Path) -> Iterator[Path]:
    """Give a path to write beside `target`, whose folder is made; when the body ends it becomes `target` in one rename.

    What a kill leaves of it has a fixed name, which the next one to write the file uses again.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    work = target.with_name(f".{target.name}.part")
    try:
        yield work
        os.replace(work, target)
    finally:
        work.unlink(missing_ok=True)
