"""Who writes a run's folder: one run at a time, by a lock that the kernel drops when its holder dies."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
import time
from pathlib import Path
from typing import IO

from pixelgen_fast.errors import InputError

OWNER = "owner.json"

log = logging.getLogger(__name__)


class Owner:
    """Holds <root>/owner.json locked from `take` to `close`, or to the end of the process."""

    def __init__(self, root: Path) -> None:
        self.path = root / OWNER
        self._file: IO[str] | None = None

    def take(self) -> None:
        """Take the folder, which is made if need be. Raises InputError that says who holds it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = self.path.open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = _holder(file)
            file.close()
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                # a file system without locks: better without than not at all
                log.warning("%s cannot be locked, so take care that one run alone writes there: %s", self.path, error)
                return
            raise InputError(
                f"run.dir {self.path.parent} is in use by {holder}; stop that run, or choose another run.dir"
            ) from error
        file.truncate(0)
        began = time.strftime("%Y-%m-%d %H:%M:%S")
        file.write(json.dumps({"host": socket.gethostname(), "process": os.getpid(), "began": began}) + "\n")
        file.flush()
        self._file = file

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _holder(file: IO[str]) -> str:
    file.seek(0)
    try:
        about = json.loads(file.read())
        return f"process {about['process']} on {about['host']} since {about['began']}"
    except (ValueError, KeyError, TypeError):
        return "another process"
