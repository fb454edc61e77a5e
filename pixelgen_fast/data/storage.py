"""Reading from storage, and telling apart why a read failed.

lack        no file handles, memory or processes: nothing is wrong with the image  -> ResourceError
away        the data root, or the linked folder or tar that holds the image, is not there, as while a network file
            system reconnects: nothing is wrong with the image either              -> DataAway
unreadable  the root is there and the image's bytes are not                        -> UnreadableImage
"""

from __future__ import annotations

import errno
import logging
import os
import resource
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from io import FileIO
from pathlib import Path
from typing import TypeVar

from pixelgen_fast.data.encoded import UnreadableImage
from pixelgen_fast.data.image_index import ImageIndex
from pixelgen_fast.errors import UserError

_LACKING = {
    errno.EMFILE: "this process may open no more files; raise the limit (ulimit -n)",
    errno.ENFILE: "the machine has no more file handles; close other programs or raise fs.file-max",
    errno.ENOMEM: "there is no memory left; use fewer data.workers or a smaller train.micro_batch",
    errno.EAGAIN: "there are no more processes or threads; raise the limit (ulimit -u) or use fewer data.workers",
}
_POLL = 0.2  # seconds between two tries
_log = logging.getLogger(__name__)
T = TypeVar("T")


class ResourceError(UserError):
    """The machine lacks file handles, memory or processes; the message names what lacks, where, and the fix."""


class DataAway(UserError):
    """The place that holds the images cannot be reached now."""


def shortage(what: str, error: Exception) -> ResourceError | None:
    """The error as a lack of resources, where it is one. what: what was tried, for the message."""
    number = errno.ENOMEM if isinstance(error, MemoryError) else getattr(error, "errno", None)
    return ResourceError(f"{what}: {_LACKING[number]} ({error})") if number in _LACKING else None


def read_bytes(index: ImageIndex, i: int) -> bytes:
    """The encoded bytes of image i. Raises ResourceError, DataAway or UnreadableImage, as above."""
    try:
        return index.read(i)
    except (OSError, MemoryError) as error:
        if lack := shortage(f"cannot read {index.path(i)}", error):
            raise lack from error
        if away(index.root) or _linked_away(index.holder(i)):
            raise DataAway(f"data root {index.root} is away: {error}") from error
        raise UnreadableImage(str(error)) from error


def patiently(read: Callable[[], T], seconds: float, asked: Callable[[], bool] = lambda: False) -> T:
    """read(), tried again for up to `seconds` while the data root is away. Raises DataAway after that, and at once when
    the run is asked to stop."""
    began, said = None, False
    while True:
        try:
            result = read()
        except DataAway as error:
            began = began or time.monotonic()
            waited = time.monotonic() - began
            if waited > seconds or asked():
                raise DataAway(f"{error}; waited {waited:.0f} s for it (data.wait_seconds)") from error
            if waited > _POLL and not said:
                _log.warning("%s; waiting up to %g s for it (data.wait_seconds)", error, seconds)
                said = True
            time.sleep(min(_POLL, seconds))
        else:
            if said:
                _log.warning("the data are back after %.1f s", time.monotonic() - began)
            return result


def away(root: Path) -> bool:
    """Whether a data root cannot be reached: it is missing, or empty, as a disk that is not mounted."""
    try:
        if root.is_file():
            return False
        with os.scandir(root) as entries:
            return next(entries, None) is None
    except OSError as error:
        return error.errno not in _LACKING


def _linked_away(holder: Path) -> bool:
    return holder.is_symlink() and not holder.exists()


class OpenFiles:
    """Files that stay open between reads, the least recently used closed when there are too many.

    most: of open files; None takes a quarter of what the process may open, 4,096 at most. Safe in threads. It travels
    to another process empty.
    """

    def __init__(self, most: int | None = None) -> None:
        self.most = most or _quarter_of_limit()
        self._files: OrderedDict[Path, FileIO] = OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple:
        return OpenFiles, ()

    def __len__(self) -> int:
        return len(self._files)

    def read(self, path: Path, offset: int, length: int) -> bytes:
        """`length` bytes from `offset` on; fewer at the file's end. Raises OSError."""
        try:
            file = self._file(path)  # the name keeps it open while it is read, whatever other threads open meanwhile
            return os.pread(file.fileno(), length, offset)
        except OSError as error:
            self._forget(path)
            if error.errno != errno.ESTALE:
                raise
            file = self._file(path)
            return os.pread(file.fileno(), length, offset)

    def _file(self, path: Path) -> FileIO:
        """The open file. Python closes it when it is neither kept here nor in use."""
        with self._lock:
            file = self._files.get(path) or self._open(path)
            self._files[path] = file
            self._files.move_to_end(path)
            while len(self._files) > self.most:
                self._files.popitem(last=False)
            return file

    def _open(self, path: Path) -> FileIO:
        try:
            return open(path, "rb", buffering=0)
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE) or not self._files:
                raise
            self._files.clear()
            return open(path, "rb", buffering=0)

    def _forget(self, path: Path) -> None:
        with self._lock:
            self._files.pop(path, None)


def _quarter_of_limit() -> int:
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 4096 if limit == resource.RLIM_INFINITY else min(max(limit // 4, 1), 4096)
