"""Image number -> encoded bytes and label, for a folder tree, tar files or a packed folder.

An index knows N images in a fixed order (classes sorted, names sorted within a class), so that "image i" means the same
in every process and after every restart. The run's order over it is a pure function too: image `number` of a run is
    index i = permutation(seed, epoch)[number mod N],   epoch = number div N
where the permutation sorts N 64-bit words of a Philox generator keyed by (seed, epoch). The words, unlike a library's
shuffle, never change between versions.

What becomes an image: .jpg .jpeg .png .webp in any case. Files and folders whose names begin with a dot are ignored.
Links are followed. Anything else is reported with counts, never dropped in silence. The first folder below the root
names the class; folders below that are read too.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path

import numpy as np
from tqdm import tqdm

from pixelgen_fast.data.cache import cache_root, published_file
from pixelgen_fast.data.encoded import ppm
from pixelgen_fast.errors import InputError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp")
PACKED_FILES = ("images.npy", "labels.npy", "classes.json")
_KINDS = "give a folder of images, a tar file, a folder of tar files or a packed folder"
_SPLITS = {"train", "val", "valid", "validation", "test"}
_log = logging.getLogger(__name__)


class ImageIndex(ABC):
    """N images in a fixed order. Picklable, and safe to use in several processes at once.

    classes: class names, label k is classes[k]. labels: int64 [N]. size: the side in pixels when all images are known
    to be squares of one size, else None.
    """

    def __init__(self, root: Path, classes: list[str], labels: np.ndarray, size: int | None = None) -> None:
        self.root, self.classes, self.labels, self.size = root, classes, labels.astype(np.int64), size

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def fingerprint(self) -> str:
        """A checksum of the images' names below the root, their order and classes; their contents are not read."""
        digest = hashlib.sha256(json.dumps([len(self), self.size, self.classes]).encode())
        digest.update(self.labels.tobytes())
        for i in range(len(self)):
            digest.update(self.path(i).removeprefix(str(self.root)).encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    def label(self, i: int) -> int:
        """The label of image i, 0 <= i < N."""
        return int(self.labels[i])

    @abstractmethod
    def path(self, i: int) -> str:
        """Where image i is, for people to read."""

    @abstractmethod
    def read(self, i: int) -> bytes:
        """The encoded bytes of image i. Raises OSError when storage does not give them."""


def open_index(root: str | Path) -> ImageIndex:
    """Open what `root` is: a packed folder, a tar file, a folder of tar files, or a folder (tree) of images.

    Raises FileNotFoundError when root is missing, ValueError when it holds no images, mixes layouts or is damaged; the
    message names the place and the fix.
    """
    root = Path(root).expanduser().absolute()
    if not root.exists():
        raise FileNotFoundError(f"data root {root} does not exist: {_KINDS}")
    if root.is_file():
        if not _is_tar(root):
            raise InputError(f"data root {root} is a file but not a .tar: {_KINDS}")
        return TarIndex(root, [root])
    present = [name for name in PACKED_FILES if (root / name).exists()]
    if len(present) == len(PACKED_FILES):
        return PackedIndex(root)
    if present:
        missing = ", ".join(sorted(set(PACKED_FILES) - set(present)))
        raise InputError(f"packed folder {root} lacks {missing}: pack it again")
    shards = sorted(p for p in root.iterdir() if _is_tar(p) and not p.name.startswith("."))
    return TarIndex(root, shards) if shards else FolderIndex(root)


class FolderIndex(ImageIndex):
    """A class-per-folder tree of JPEG, PNG and WebP files; files straight in the root are one class of the root's
    name."""

    def __init__(self, root: Path) -> None:
        others = _Others()
        folders = sorted(e.name for e in os.scandir(root) if e.is_dir() and not e.name.startswith("."))
        straight = others.images(sorted(e.name for e in os.scandir(root) if not e.is_dir()))
        if not folders:
            classes, found = [root.name], [straight]
        else:
            classes, found = folders, [others.images(_walk(root, name, ())) for name in folders]
            if straight and any(found):
                raise InputError(
                    f"{root} holds {len(straight):,} images beside class folders (first: {straight[0]}): move them "
                    "into a class folder, or the class folders elsewhere"
                )
            if straight:
                raise InputError(f"{root} holds images, and folders without any ({folders[0]}, ...): remove those")
        if not any(found):
            raise InputError(f"{root} holds no images ({', '.join(EXTENSIONS)}): {others.text() or 'it is empty'}")
        others.warn(root)
        _warn_classes(root, classes, [len(names) for names in found])
        if len(classes) == 1 and found[0][0].count("/") > 1:
            below = root / classes[0]
            _log.warning("%s: one class, %s, with folders below it; did you mean %s?", root, classes[0], below)
        self._names = _Names(name for names in found for name in names)
        super().__init__(root, classes, np.repeat(np.arange(len(classes)), [len(names) for names in found]))

    def path(self, i: int) -> str:
        return str(self.root / self._names[i])

    def read(self, i: int) -> bytes:
        with open(self.path(i), "rb", buffering=0) as file:
            return file.read()


class TarIndex(ImageIndex):
    """Uncompressed tar files with members CLASS/NAME.ext, read in place.

    Members' offsets are found once and kept in the cache directory under the shards' paths, sizes and times; reading is
    one positioned read, so processes and threads share nothing that moves.
    """

    def __init__(self, root: Path, shards: list[Path]) -> None:
        stats = [shard.stat() for shard in shards]
        identity = json.dumps([(str(p), s.st_size, s.st_mtime_ns) for p, s in zip(shards, stats, strict=True)])
        table = cache_root() / "tar" / f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}.npz"
        if not table.exists():
            _write_table(root, shards, table)
        with np.load(table) as arrays:
            self._shard, self._offset, self._length = arrays["shard"], arrays["offset"], arrays["length"]
            self._names = _Names.restored(arrays["names"], arrays["ends"])
            labels, classes = arrays["labels"], json.loads(arrays["classes"].tobytes())
        self._shards = shards
        self._files: dict[int, int] = {}
        super().__init__(root, classes, labels)

    def path(self, i: int) -> str:
        return f"{self._shards[self._shard[i]]}:{self._names[i]}"

    def read(self, i: int) -> bytes:
        shard, length = int(self._shard[i]), int(self._length[i])
        if shard not in self._files:
            self._files[shard] = os.open(self._shards[shard], os.O_RDONLY)
        data = os.pread(self._files[shard], length, int(self._offset[i]))
        if len(data) != length:
            raise OSError(f"{self.path(i)}: {len(data)} of {length} bytes; the tar file changed or is cut short")
        return data

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_files": {}}

    def __del__(self) -> None:
        for file in getattr(self, "_files", {}).values():
            os.close(file)


class PackedIndex(ImageIndex):
    """Images of one size, decoded ahead of time: images.npy uint8 [N, S, S, 3], labels.npy int64 [N], classes.json."""

    def __init__(self, root: Path) -> None:
        self._file = root / "images.npy"
        self._images = np.load(self._file, mmap_mode="r")
        labels, classes = np.load(root / "labels.npy"), json.loads((root / "classes.json").read_text())
        shape, dtype = self._images.shape, self._images.dtype
        if dtype != np.uint8 or len(shape) != 4 or shape[1] != shape[2] or shape[3] != 3:
            raise InputError(f"{self._file} must be uint8 [N, S, S, 3], got {dtype} {list(shape)}: pack it again")
        if labels.shape != shape[:1] or shape[0] == 0:
            raise InputError(f"{root} holds {shape[0]:,} images and {labels.size:,} labels: pack it again")
        if labels.min() < 0 or labels.max() >= len(classes):
            raise InputError(f"{root}/labels.npy goes to {labels.max()}, classes.json has {len(classes)}: pack again")
        super().__init__(root, classes, labels, size=shape[1])

    def path(self, i: int) -> str:
        return f"{self._file}[{i}]"

    def read(self, i: int) -> bytes:
        return ppm(self.size, self.size, self._images[i].tobytes())

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_images": None}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._images = np.load(self._file, mmap_mode="r")


class _Names:
    """N strings in one block of bytes: a million paths pickle and copy as two arrays."""

    def __init__(self, names: Iterable[str]) -> None:
        encoded = [os.fsencode(name) for name in names]
        self.block = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        self.ends = np.cumsum([len(name) for name in encoded], dtype=np.int64)

    @classmethod
    def restored(cls, block: np.ndarray, ends: np.ndarray) -> _Names:
        names = cls(())
        names.block, names.ends = block, ends
        return names

    def __getitem__(self, i: int) -> str:
        start = self.ends[i - 1] if i else 0
        return os.fsdecode(self.block[start : self.ends[i]].tobytes())


class _Others:
    """Counts the files that are not images, by extension, with one example each."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.examples: dict[str, str] = {}

    def images(self, names: Iterable[str]) -> list[str]:
        """The names that are images; hidden ones are left out, the rest is counted."""
        kept = []
        for name in names:
            base = name.rpartition("/")[2]
            extension = os.path.splitext(base)[1].lower()
            if base.startswith("."):
                continue
            if extension in EXTENSIONS:
                kept.append(name)
            else:
                self.counts[extension] = self.counts.get(extension, 0) + 1
                self.examples.setdefault(extension, name)
        return kept

    def text(self) -> str:
        ranked = sorted(self.counts, key=lambda e: -self.counts[e])
        parts = [f"{e or 'no extension'} x {self.counts[e]:,} (e.g. {self.examples[e]})" for e in ranked]
        return "files of other kinds: " + ", ".join(parts) if parts else ""

    def warn(self, root: Path) -> None:
        if self.counts:
            _log.warning("%s: not read, %s. Read are %s", root, self.text(), ", ".join(EXTENSIONS))


def _warn_classes(root: Path, classes: list[str], counts: list[int]) -> None:
    empty = [name for name, count in zip(classes, counts, strict=True) if not count]
    if empty:
        named = ", ".join(empty[:20])
        _log.warning("%s: %d of %d class folders hold no images: %s", root, len(empty), len(classes), named)
    if len(classes) > 1 and {name.lower() for name in classes} <= _SPLITS:
        _log.warning("%s: the classes are %s; did you mean %s?", root, ", ".join(classes), root / classes[0])


def _walk(root: Path, folder: str, above: tuple[tuple[int, int], ...]) -> Iterator[str]:
    """Paths of all files under root/folder, relative to root, in sorted order; a link to a folder above is an error."""
    status = os.stat(root / folder)
    here = (status.st_dev, status.st_ino)
    if here in above:
        raise InputError(f"{root / folder} links to a folder above itself: remove the link")
    for entry in sorted(os.scandir(root / folder), key=lambda e: e.name):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _walk(root, f"{folder}/{entry.name}", (*above, here))
        else:
            yield f"{folder}/{entry.name}"


def _is_tar(path: Path) -> bool:
    return path.suffix == ".tar" and path.is_file()


def _write_table(root: Path, shards: list[Path], table: Path) -> None:
    """Read every header of the shards and write where each image lies."""
    found: list[tuple[str, int, int, int]] = []
    others = _Others()
    for number, shard in enumerate(tqdm(shards, desc=f"index {root.name}", unit="tar", disable=None)):
        try:
            with tarfile.open(shard, "r:") as archive:
                members = {m.name.removeprefix("./"): m for m in archive if not m.isdir()}
        except (tarfile.TarError, EOFError) as error:
            raise InputError(f"{shard} is not an uncompressed tar, or is damaged: {error}") from error
        kept = others.images(members)
        if link := next((name for name in kept if not members[name].isfile()), None):
            raise InputError(f"{shard}: member {link} is a link: make the tar with --dereference --hard-dereference")
        if flat := next((name for name in kept if "/" not in name), None):
            raise InputError(f"{shard}: member {flat} has no class folder: members must be CLASS/NAME.ext")
        found += [(name, number, members[name].offset_data, members[name].size) for name in kept]
    if not found:
        raise InputError(f"{root} holds no images: {others.text() or 'its tar files are empty'}")
    others.warn(root)
    found.sort()
    names = _Names(name for name, *_ in found)
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
