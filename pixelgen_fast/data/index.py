"""A data root, whatever it is, as an index: image number -> encoded bytes and label.

An index knows N images in a fixed order, so that "image i" means the same in every process and after every restart;
which image of a run is which of the index is order.py's.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pixelgen_fast.data.files import EXTENSIONS, Selection, walk, warn_classes
from pixelgen_fast.data.image_index import ImageIndex, Names
from pixelgen_fast.data.packed import PACKED_FILES, PackedIndex
from pixelgen_fast.data.parquet import ParquetIndex, parquet_files
from pixelgen_fast.data.tar import TarIndex
from pixelgen_fast.errors import InputError

_KINDS = "give a folder of images, a tar or Parquet file, a folder of such files or a packed folder"


def open_index(root: str | Path) -> ImageIndex:
    """Open what `root` is: a packed folder, a tar or Parquet file, a folder of such files, or a folder (tree) of
    images.

    Raises FileNotFoundError when root is missing, ValueError when it holds no images, mixes layouts or is damaged; the
    message names the place and the fix.
    """
    root = Path(root).expanduser().absolute()
    if not root.exists():
        raise FileNotFoundError(f"data root {root} does not exist: {_KINDS}")
    if root.is_file():
        if root.suffix == ".parquet":
            return ParquetIndex(root, [root])
        if not _is_tar(root):
            raise InputError(f"data root {root} is a file but not a .tar or .parquet: {_KINDS}")
        return TarIndex(root, [root])
    present = [name for name in PACKED_FILES if (root / name).exists()]
    if len(present) == len(PACKED_FILES):
        return PackedIndex(root)
    if present:
        missing = ", ".join(sorted(set(PACKED_FILES) - set(present)))
        raise InputError(f"packed folder {root} lacks {missing}: pack it again")
    tars = sorted(p for p in root.iterdir() if _is_tar(p) and not p.name.startswith("."))
    if parquets := parquet_files(root):
        if tars:
            raise InputError(f"{root} holds tar files ({tars[0].name}, ...) beside {parquets[0]}: keep one of the two")
        return ParquetIndex(root, parquets)
    return TarIndex(root, tars) if tars else FolderIndex(root)


class FolderIndex(ImageIndex):
    """A class-per-folder tree of JPEG, PNG and WebP files; files straight in the root are one class of the root's
    name."""

    kind = "a folder of images"

    def __init__(self, root: Path) -> None:
        selection = Selection()
        entries = sorted((e.name, e.is_dir()) for e in os.scandir(root))
        classes = [name for name, is_folder in entries if is_folder and selection.enters(name)]
        straight = selection.images(name for name, is_folder in entries if not is_folder)
        found = [selection.images(walk(root, name, selection)) for name in classes]
        if not classes:
            classes, found = [root.name], [straight]
        elif straight:
            raise InputError(_beside(root, straight, classes, any(found)))
        self._below = found[0] is not straight
        if not any(found):
            raise InputError(f"{root} holds no images ({', '.join(EXTENSIONS)}): {selection.text() or 'it is empty'}")
        selection.warn(root)
        counts = [len(names) for names in found]
        warn_classes(root, classes, counts, found[0][0] if found[0] else "")
        self._names = Names(name for names in found for name in names)
        super().__init__(root, classes, np.repeat(np.arange(len(classes)), counts))

    def path(self, i: int) -> str:
        return os.path.join(self.root, self._names[i])

    def places(self) -> Iterator[bytes]:
        return (b"/" + name for name in self._names.encoded())

    def holder(self, i: int) -> Path:
        return self.root / self.classes[self.label(i)] if self._below else self.root

    def read(self, i: int) -> bytes:
        with open(self.path(i), "rb", buffering=0) as file:
            return file.read()


def _beside(root: Path, straight: list[str], folders: list[str], with_images: bool) -> str:
    """Why images straight in the root, beside folders, are refused."""
    if not with_images:
        return f"{root} holds images, and folders without any ({folders[0]}, ...): remove those"
    return (
        f"{root} holds {len(straight):,} images beside class folders (first: {straight[0]}): move them into a class "
        "folder, or the class folders elsewhere"
    )


def _is_tar(path: Path) -> bool:
    return path.suffix == ".tar" and path.is_file()
