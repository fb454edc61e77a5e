"""A pack under way, which a kill at any moment leaves so that the same command goes on.

    .NAME.part/images.part       the .npy header of all images, then the pixels of those that are packed
               checksums.part    their CRC-32, uint32
               journal.jsonl     what is packed: `Made` and the decoders first, then {done, written, unreadable} again
                                 and again, each after the pixels before it are on the disk

What lies behind the journal's last line is cut off and made again. At the end the small files are written, images.part
becomes images.npy, the journal goes, and the folder gets its name: none of the names before that is a packed folder's.
One process at a time holds the lock on images.part, which its death gives up.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import time
import zlib
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np

from pixelgen_fast.atomic import sync
from pixelgen_fast.data.image_index import ImageIndex
from pixelgen_fast.data.manifest import CHECKSUMS, Made, Manifest, decoders, seal
from pixelgen_fast.errors import InputError

_SYNC_SECONDS = 5.0  # work that a kill may cost
_SEAL = 4  # bytes of a CRC-32
_log = logging.getLogger(__name__)


def sealed(pixels: bytes) -> bytes:
    """Pixels, and behind them their CRC-32."""
    return pixels + zlib.crc32(pixels).to_bytes(_SEAL, "little")


def part_of(out: Path) -> Path:
    """The folder in which `out` is being written."""
    return out.with_name(f".{out.name}.part")


class Progress:
    """done: images of the source that have been worked on. complete: whether only `publish` is missing.

    Raises InputError when another process is at it, when what was begun is another pack, and on leaving for what the
    disk does not take.
    """

    def __init__(self, out: Path, index: ImageIndex, made: Made) -> None:
        self.out, self.index, self.made, self.folder = out, index, made, part_of(out)
        self.done = self.written = 0
        self.unreadable: dict[int, str] = {}
        self._new: dict[int, str] = {}
        self._synced = time.monotonic()
        self.complete = (self.folder / "images.npy").exists()

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as files:
            self._images = files.enter_context(self._opened("images.npy" if self.complete else "images.part"))
            self._lock()
            if not self.complete:
                self._sums = files.enter_context(self._opened("checksums.part"))
                self._journal = files.enter_context(self._opened("journal.jsonl"))
                self._resume()
            self._files = files.pop_all()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        with suppress(OSError):  # what could not be flushed is not in the journal
            self._files.close()
        if isinstance(error, OSError):
            raise InputError(
                f"cannot write {self.out}: {error}; mend that, and the same command goes on from there"
            ) from error

    def add(self, i: int, result: np.ndarray | str) -> None:
        """Image i of the source, the one after the last: what `sealed` made of its pixels, or why there are none."""
        if isinstance(result, str):
            self.unreadable[i] = self._new[i] = result
        else:
            self._images.write(result[:-_SEAL])
            self._sums.write(result[-_SEAL:])
            self.written += 1
        self.done = i + 1
        if time.monotonic() - self._synced > _SYNC_SECONDS:
            self._sync()

    def publish(self) -> Manifest:
        """Give the finished folder its name. Raises InputError, and leaves nothing, when it has no images."""
        if not self.complete:
            if not self.written:
                self._remove()
                path, reason = next((self.index.path(i), why) for i, why in self.unreadable.items())
                raise InputError(
                    f"none of the {len(self.index):,} images of {self.index.root} is readable: {path}: {reason}"
                )
            self._finish()
        manifest = Manifest.read(self.folder)
        if manifest is None or manifest.made != self.made:
            raise InputError(f"{self.folder} holds another pack, finished but for its name: remove it")
        for name in ("journal.jsonl", "checksums.part"):
            (self.folder / name).unlink(missing_ok=True)
        self.folder.rename(self.out)
        sync(self.out.parent)
        return manifest

    def _opened(self, name: str) -> BinaryIO:
        """A file to read and write, made if missing."""
        return os.fdopen(os.open(self.folder / name, os.O_RDWR | os.O_CREAT, 0o666), "r+b")

    def _lock(self) -> None:
        try:
            fcntl.flock(self._images, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"another process is writing {self.out}: let it finish, or end it first") from error
        except OSError as error:
            _log.warning("%s: no lock can be had here (%s): let no second process write it", self.folder, error)
        name = self.folder / ("images.npy" if self.complete else "images.part")
        if not (name.exists() and os.path.samestat(os.fstat(self._images.fileno()), name.stat())):
            raise InputError(f"another process has just written {self.out}")

    def _resume(self) -> None:
        """Go on behind the journal's last whole line, or begin."""
        begun = {"made": asdict(self.made), "decoders": decoders()}
        lines, length = _whole_lines(self._journal.read())
        if lines and lines[0] != begun:
            raise InputError(
                f"{self.folder} is the beginning of another pack ({_difference(lines[0], begun)}): give that command "
                "again, or remove the folder"
            )
        for line in lines[1:]:
            self.done, self.written = line["done"], line["written"]
            self.unreadable |= {int(i): why for i, why in line["unreadable"].items()}
        header = self._write_header(len(self.index))
        self._cut(self._images, header + self.written * self.made.size**2 * 3)
        self._cut(self._sums, self.written * _SEAL)
        self._cut(self._journal, length)
        if not lines:
            self._note(begun)
        if self.done:
            _log.warning("%s: going on from image %s of %s", self.out, f"{self.done:,}", f"{len(self.index):,}")

    def _cut(self, file: BinaryIO, size: int) -> None:
        """Drop what lies behind `size`, and go on there."""
        if (there := file.seek(0, os.SEEK_END)) < size:
            raise InputError(f"{self.folder} is damaged ({there:,} bytes, the journal says {size:,}): remove it")
        file.truncate(size)
        file.seek(size)

    def _write_header(self, count: int) -> int:
        """The .npy header of uint8 [count, S, S, 3]; returns its length, which does not depend on count."""
        shape = (count, self.made.size, self.made.size, 3)
        self._images.seek(0)
        np.lib.format.write_array_header_1_0(self._images, {"descr": "|u1", "fortran_order": False, "shape": shape})
        return self._images.tell()

    def _sync(self) -> None:
        """Everything so far is on the disk, and then in the journal."""
        for file in (self._images, self._sums):
            file.flush()
            os.fdatasync(file.fileno())
        self._note({"done": self.done, "written": self.written, "unreadable": self._new})
        self._new = {}
        self._synced = time.monotonic()

    def _note(self, line: dict[str, Any]) -> None:
        self._journal.write(json.dumps(line).encode() + b"\n")
        self._journal.flush()
        os.fsync(self._journal.fileno())

    def _finish(self) -> None:
        """All files of a packed folder."""
        self._write_header(self.written)
        self._sync()
        left_out = [*self.unreadable]
        np.save(self.folder / "labels.npy", np.delete(self.index.labels, left_out))
        np.save(self.folder / CHECKSUMS, np.fromfile(self.folder / "checksums.part", "<u4"))
        (self.folder / "classes.json").write_text(json.dumps(self.index.classes) + "\n")
        small = ("labels.npy", CHECKSUMS, "classes.json")
        Manifest(
            made=self.made,
            decoders=decoders(),
            root=str(self.index.root),
            images=self.written,
            classes=len(self.index.classes),
            unreadable={self.index.path(i): why for i, why in self.unreadable.items()},
            files={name: seal(self.folder / name) for name in small},
        ).write(self.folder)
        for file in self.folder.iterdir():
            sync(file)
        (self.folder / "images.part").rename(self.folder / "images.npy")
        sync(self.folder)

    def _remove(self) -> None:
        for file in self.folder.iterdir():
            file.unlink()
        self.folder.rmdir()


def _whole_lines(journal: bytes) -> tuple[list[Any], int]:
    """The lines up to the first that is not whole, and how many bytes they are."""
    lines: list[Any] = []
    length = 0
    for line in journal.splitlines(keepends=True):
        try:
            entry = json.loads(line)
        except ValueError:
            break
        if not line.endswith(b"\n"):
            break
        lines.append(entry)
        length += len(line)
    return lines, length


def _difference(begun: dict[str, Any], asked: dict[str, Any]) -> str:
    """Which entries of two tables of tables differ, in words."""
    pairs = [(f"{part} {key}", begun.get(part, {}).get(key), asked[part][key]) for part in asked for key in asked[part]]
    return ", ".join(f"{name} {before} -> {now}" for name, before, now in pairs if before != now)
