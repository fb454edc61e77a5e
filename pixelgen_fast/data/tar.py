"""Uncompressed tar files with members CLASS/NAME.ext, read in place.

Members' offsets are found once and kept in the cache directory under the shards' paths, sizes and times; reading is one
positioned read, so processes and threads share nothing that moves. Which members are images, and their order, is as in
a folder (files.py): a tree and its tars are the same data set.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from pathlib import Path

import numpy as np
from tqdm import tqdm

from pixelgen_fast.data.cache import cache_root, published_file
from pixelgen_fast.data.files import Selection, order_key, warn_classes
from pixelgen_fast.data.image_index import ImageIndex, Names
from pixelgen_fast.data.storage import OpenFiles
from pixelgen_fast.errors import InputError

# Which images a table lists, and how: tables of another version are made anew.
_VERSION = 2


class TarIndex(ImageIndex):
    """Tar files as one data set. root: the file or folder that was named. shards: the tar files, sorted.

    Raises InputError for a file that is no uncompressed tar, and for members that are links or in no class folder.
    """

    def __init__(self, root: Path, shards: list[Path]) -> None:
        stats = [shard.stat() for shard in shards]
        identity = [(str(p), s.st_size, s.st_mtime_ns) for p, s in zip(shards, stats, strict=True)]
        key = hashlib.sha256(json.dumps([_VERSION, *identity]).encode()).hexdigest()[:32]
        table = cache_root() / "tar" / f"{key}.npz"
        if not table.exists():
            _write_table(root, shards, table)
        with np.load(table) as arrays:
            self._shard, self._offset, self._length = arrays["shard"], arrays["offset"], arrays["length"]
            self._names = Names.restored(arrays["names"], arrays["ends"])
            labels, classes = arrays["labels"], json.loads(arrays["classes"].tobytes())
        self._shards = shards
        self._open = OpenFiles()
        counts = np.bincount(labels, minlength=len(classes)).tolist()
        warn_classes(root, classes, counts, self._names[0])
        super().__init__(root, classes, labels)

    def path(self, i: int) -> str:
        return f"{self._shards[self._shard[i]]}:{self._names[i]}"

    def holder(self, i: int) -> Path:
        return self._shards[self._shard[i]]

    def read(self, i: int) -> bytes:
        length = int(self._length[i])
        data = self._open.read(self.holder(i), int(self._offset[i]), length)
        if len(data) != length:
            raise OSError(f"{self.path(i)}: {len(data)} of {length} bytes; the tar file changed or is cut short")
        return data


def _write_table(root: Path, shards: list[Path], table: Path) -> None:
    """Read every header of the shards and write where each image lies."""
    found: list[tuple[str, int, int, int]] = []
    selection = Selection()
    for number, shard in enumerate(tqdm(shards, desc=f"index {root.name}", unit="tar", disable=None)):
        members = _members(shard)
        kept = selection.images(members)
        if link := next((name for name in kept if not members[name].isfile()), None):
            raise InputError(f"{shard}: member {link} is a link: make the tar with --dereference --hard-dereference")
        if flat := next((name for name in kept if "/" not in name), None):
            raise InputError(f"{shard}: member {flat} has no class folder: members must be CLASS/NAME.ext")
        found += [(name, number, members[name].offset_data, members[name].size) for name in kept]
    if not found:
        raise InputError(f"{root} holds no images: {selection.text() or 'its tar files are empty'}")
    selection.warn(root)
    found.sort(key=lambda row: (order_key(row[0]), *row[1:]))
    names = Names(name for name, *_ in found)
    of_image = [name.partition("/")[0] for name, *_ in found]
    classes = sorted(set(of_image))
    number_of = {name: k for k, name in enumerate(classes)}
    columns = np.array([row[1:] for row in found], dtype=np.int64)
    with published_file(table) as work:
        np.savez(
            work,
            **dict(zip(("shard", "offset", "length"), columns.T, strict=True)),
            names=names.block,
            ends=names.ends,
            labels=np.array([number_of[name] for name in of_image]),
            classes=np.frombuffer(json.dumps(classes).encode(), dtype=np.uint8),
        )


def _members(shard: Path) -> dict[str, tarfile.TarInfo]:
    """The members that are not folders, by name."""
    try:
        with tarfile.open(shard, "r:") as archive:
            return {member.name.removeprefix("./"): member for member in archive if not member.isdir()}
    except (tarfile.TarError, EOFError) as error:
        raise InputError(f"{shard} is not an uncompressed tar, or is damaged: {error}") from error
