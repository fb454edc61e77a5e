"""Uncompressed tar files with members CLASS/NAME.ext, or WebDataset's pairs (webdataset.py), read in place.

Members' offsets are found once and kept in the cache directory under the shards' paths, sizes and times; reading is one
positioned read, so processes and threads share nothing that moves. Which members are images, and their order, is as in
a folder (files.py): a tree and its tars are the same data set.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from pixelgen_fast.data.cache import cache_root, published_file
from pixelgen_fast.data.files import Selection, order_key, warn_classes
from pixelgen_fast.data.image_index import ImageIndex, Names
from pixelgen_fast.data.storage import OpenFiles
from pixelgen_fast.data.webdataset import class_names, label_file, read_class
from pixelgen_fast.errors import InputError

# Which images a table lists, and how: tables of another version are made anew.
_VERSION = 3


class TarIndex(ImageIndex):
    """Tar files as one data set. root: the file or folder that was named. shards: the tar files, sorted.

    Raises InputError for a file that is no uncompressed tar, and for members that are links or of no class.
    """

    kind = "tar files"

    def __init__(self, root: Path, shards: list[Path]) -> None:
        stats = [shard.stat() for shard in shards]
        identity = [(str(p), s.st_size, s.st_mtime_ns) for p, s in zip(shards, stats, strict=True)]
        key = hashlib.sha256(json.dumps([_VERSION, *identity]).encode()).hexdigest()[:32]
        self.kept = table = cache_root() / "tar" / f"{key}.npz"
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

    def places(self) -> Iterator[bytes]:
        shards = [self.below_root(shard) + b":" for shard in self._shards]
        for shard, name in zip(self._shard.tolist(), self._names.encoded(), strict=True):
            yield shards[shard] + name

    def stored_bytes(self) -> int:
        return int(self._length.sum())

    def holder(self, i: int) -> Path:
        return self._shards[self._shard[i]]

    def read(self, i: int) -> bytes:
        length = int(self._length[i])
        data = self._open.read(self.holder(i), int(self._offset[i]), length)
        if len(data) != length:
            raise OSError(f"{self.path(i)}: {len(data)} of {length} bytes; the tar file changed or is cut short")
        return data


class _Member(NamedTuple):
    """An image of the shards, and where its bytes lie."""

    kind: str
    name: str
    shard: int
    offset: int
    length: int


def _write_table(root: Path, shards: list[Path], table: Path) -> None:
    """Read every header of the shards and write where each image lies."""
    found: list[_Member] = []
    selection = Selection()
    labelled = 0
    for number, shard in enumerate(tqdm(shards, desc=f"index {root.name}", unit="tar", disable=None)):
        images, by_file = _images(shard, number, selection)
        found += images
        labelled += by_file
    if not found:
        raise InputError(f"{root} holds no images: {selection.text() or 'its tar files are empty'}")
    if labelled not in (0, len(found)):
        raise InputError(
            f"{root}: {labelled:,} of {len(found):,} images have a .cls or .json beside them: give it to all"
        )
    selection.warn(root)
    of_image = [member.kind for member in found]
    classes = class_names(of_image) if labelled else sorted(set(of_image))
    number_of = {name: k for k, name in enumerate(classes)}
    found.sort(key=lambda member: (number_of[member.kind], order_key(member.name), *member[2:]))
    names = Names(member.name for member in found)
    columns = np.array([member[2:] for member in found], dtype=np.int64)
    with published_file(table) as work:
        np.savez(
            work,
            **dict(zip(("shard", "offset", "length"), columns.T, strict=True)),
            names=names.block,
            ends=names.ends,
            labels=np.array([number_of[member.kind] for member in found]),
            classes=np.frombuffer(json.dumps(classes).encode(), dtype=np.uint8),
        )


def _images(shard: Path, number: int, selection: Selection) -> tuple[list[_Member], int]:
    """The images of a shard, and how many of them have their class from a file beside them."""
    members = _members(shard)
    label_of = {name: file for name in members if (file := label_file(members, name)) not in (None, name)}
    label_files = set(label_of.values())
    kept = selection.images(name for name in members if name not in label_files)
    if link := next((name for name in kept if not members[name].isfile()), None):
        raise InputError(f"{shard}: member {link} is a link: make the tar with --dereference --hard-dereference")
    if flat := next((name for name in kept if "/" not in name and name not in label_of), None):
        raise InputError(
            f"{shard}: member {flat} has no class folder, and no .cls or .json beside it: members must be "
            "CLASS/NAME.ext, or pairs NAME.ext and NAME.cls"
        )
    images = []
    with open(shard, "rb", buffering=0) as file:
        for name in kept:
            label = label_of.get(name)
            kind = read_class(file.fileno(), shard, members[label]) if label else name.partition("/")[0]
            images.append(_Member(kind, name, number, members[name].offset_data, members[name].size))
    return images, sum(name in label_of for name in kept)


def _members(shard: Path) -> dict[str, tarfile.TarInfo]:
    """The members that are not folders, by name."""
    try:
        with tarfile.open(shard, "r:") as archive:
            return {member.name.removeprefix("./"): member for member in archive if not member.isdir()}
    except (tarfile.TarError, EOFError) as error:
        raise InputError(f"{shard} is not an uncompressed tar, or is damaged: {error}") from error
