"""What is an image of a data set: one answer for folders and tar files, training, scanning, packing and FID.

An image is a file named .jpg .jpeg .png .webp, in any case, that lies in no hidden or foreign folder. Hidden are names
that begin with a dot; foreign are the folders that storage systems and file managers make by themselves (thumbnails of
a NAS, recycle bins, snapshots, what macOS adds to a zip file). Links are followed. Anything else is reported with
counts, never dropped in silence. The first folder below the root names the class; folders below that are read too.
The order is that of the classes' names, then that of the names within a class, folder by folder.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from pixelgen_fast.errors import InputError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp")
_FOREIGN = {
    "@eadir", "@recycle", "@recently-snapshot", "@tmp", "#recycle", "#snapshot", "~snapshot", "__macosx",
    "$recycle.bin", "system volume information", "network trash folder", "temporary items", "lost+found",
}  # fmt: skip
SPLITS = {"train", "val", "valid", "validation", "test"}
_log = logging.getLogger(__name__)


def is_foreign(folder: str) -> bool:
    """Whether a folder of this name is the storage system's, not the data set's."""
    return folder.lower() in _FOREIGN


def order_key(name: str) -> list[str]:
    """What names below a root, parts separated by /, are sorted by."""
    return name.split("/")


class Selection:
    """Picks the images among names, and counts what it leaves out, with one example of each kind."""

    def __init__(self) -> None:
        self.kinds: Counter[str] = Counter()
        self.examples: dict[str, str] = {}
        self.foreign: Counter[str] = Counter()

    def images(self, names: Iterable[str]) -> list[str]:
        """The names, parts separated by /, that are images. Hidden ones are left out, the rest is counted."""
        return [name for name in names if self._takes(name)]

    def _takes(self, name: str) -> bool:
        *folders, base = name.split("/")
        extension = os.path.splitext(base)[1].lower()
        if any(part.startswith(".") for part in (*folders, base)):
            return False
        if foreign := next(filter(is_foreign, folders), None):
            self.foreign[foreign] += 1
            return False
        if extension not in EXTENSIONS:
            self.kinds[extension] += 1
            self.examples.setdefault(extension, name)
        return extension in EXTENSIONS

    def enters(self, folder: str) -> bool:
        """Whether the folder of this name is one of the data set; a foreign one is counted."""
        if is_foreign(folder):
            self.foreign[folder] += 1
        return not (folder.startswith(".") or is_foreign(folder))

    def text(self) -> str:
        """What was left out, in words; empty where nothing was."""
        kinds = [f"{e or 'no extension'} x {n:,} (e.g. {self.examples[e]})" for e, n in self.kinds.most_common()]
        folders = [f"{name} x {n:,}" for name, n in self.foreign.most_common()]
        parts = ["files of other kinds: " + ", ".join(kinds)] * bool(kinds)
        return "; ".join([*parts, *["folders of the storage system: " + ", ".join(folders)] * bool(folders)])

    def warn(self, root: Path) -> None:
        if text := self.text():
            _log.warning("%s: not read, %s. Read are %s", root, text, ", ".join(EXTENSIONS))


def walk(root: Path, folder: str, selection: Selection, above: tuple[tuple[int, int], ...] = ()) -> Iterator[str]:
    """Paths of all files under root/folder, relative to root, in order. Raises InputError for a link to a folder above
    it."""
    status = os.stat(root / folder)
    here = (status.st_dev, status.st_ino)
    if here in above:
        raise InputError(f"{root / folder} links to a folder above itself: remove the link")
    for entry in sorted(os.scandir(root / folder), key=lambda e: e.name):
        if not entry.is_dir():
            yield f"{folder}/{entry.name}"
        elif selection.enters(entry.name):
            yield from walk(root, f"{folder}/{entry.name}", selection, (*above, here))


def warn_classes(root: Path, classes: list[str], counts: list[int], example: str) -> None:
    """Warn about empty classes and a root one level too high. example: the name of one image of the first class."""
    empty = [name for name, count in zip(classes, counts, strict=True) if not count]
    if empty:
        named = ", ".join(empty[:20])
        _log.warning("%s: %d of %d class folders hold no images: %s", root, len(empty), len(classes), named)
    if len(classes) > 1 and {name.lower() for name in classes} <= SPLITS:
        _log.warning("%s: the classes are %s; did you mean %s?", root, ", ".join(classes), root / classes[0])
    if len(classes) == 1 and example.count("/") > 1:
        below = root / classes[0]
        _log.warning("%s: one class, %s, with folders below it; did you mean %s?", root, classes[0], below)
