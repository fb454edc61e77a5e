"""Where derived files live, and how they appear whole or not at all.

The cache directory is $PIXELGEN_CACHE, else $XDG_CACHE_HOME/pixelgen_fast, else ~/.cache/pixelgen_fast. It holds what
can be made again: the digits' PNG tree and the member tables of tar files. A file or folder is written under a
temporary name in the same directory and renamed, so that a reader never meets half of it, whichever process is killed
when.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def cache_root() -> Path:
    """The cache directory (made if missing). Raises OSError naming the path when it cannot be made."""
    if named := os.environ.get("PIXELGEN_CACHE"):
        root = Path(named)
    else:
        base = os.environ.get("XDG_CACHE_HOME")
        root = (Path(base) if base else Path.home() / ".cache") / "pixelgen_fast"
    root = root.expanduser().absolute()
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"cannot make the cache folder {root}: {error}; set PIXELGEN_CACHE to a writable one") from error
    return root


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on the file `path` (made if missing): one process at a time runs the body.

    The kernel drops the lock when its holder dies, so a killed process never blocks the next one.
    """
    with open(path, "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


@contextmanager
def published_folder(target: Path) -> Iterator[Path]:
    """Give a temporary folder to fill; when the body ends it becomes `target`, replacing what stood there.

    When the body raises, the temporary folder is removed and `target` is left as it was.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        built = work / "new"
        built.mkdir()
        yield built
        if target.exists():
            target.rename(work / "old")
        built.rename(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


@contextmanager
def published_file(target: Path) -> Iterator[Path]:
    """Give a temporary path to write; when the body ends it becomes `target` in one rename."""
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=target.suffix, dir=target.parent)
    os.close(handle)
    try:
        yield Path(name)
        os.replace(name, target)
    finally:
        Path(name).unlink(missing_ok=True)
