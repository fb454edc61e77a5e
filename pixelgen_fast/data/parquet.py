"""Parquet files as Hugging Face's hub holds images, for example ImageNet: `train-00000-of-00294.parquet` and so on.

    column image   a struct {bytes, path}, or the encoded bytes straight      column label   integers from 0

The order is that of the files' names, then that of their rows. Class names are those of a ClassLabel in the schema's
`huggingface` metadata, or else "class 0", "class 1", ... All labels are read at opening, images when asked for.

Parquet gives no single image: a row group (on the hub 100 to 1,000 images) is read and decompressed as one. A process
keeps the last row groups, 256 MiB of them. Reading in order (`pixelgen data scan` and `pack`, FID) decodes each once;
a shuffled read of a data set much larger than that decodes one for nearly every image, a hundred times its bytes or
more. To train at speed, above all from slow storage, pack it first (`pixelgen data pack`) or make a tar of it.

A file is open only while a row group is read. This module is the only importer of pyarrow.
"""

from __future__ import annotations

import json
import re
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from pixelgen_fast.data.files import SPLITS, warn_classes
from pixelgen_fast.data.image_index import ImageIndex
from pixelgen_fast.errors import InputError

if TYPE_CHECKING:
    from pyarrow import ChunkedArray, Schema
    from pyarrow.parquet import ParquetFile

_KEPT_BYTES = 256 * 2**20
# Labels up to here are believed; a larger one is no class.
_MOST_CLASSES = 1_000_000


def parquet_files(root: Path) -> list[Path]:
    """The Parquet files of a folder, or else of the folder `data` in it, sorted. Raises InputError for several splits:
    a data set is one of them."""
    for folder in (root, root / "data"):
        files = sorted(p for p in folder.glob("[!.]*.parquet") if p.is_file())
        splits = Counter(_split(file) for file in files)
        if len(splits) > 1:
            named = ", ".join(f"{name or 'no split'} x {count:,}" for name, count in sorted(splits.items()))
            raise InputError(
                f"{folder} holds Parquet files of several splits ({named}): put those of one into a folder of their "
                f"own, links will do (mkdir train && ln -s {folder}/train-*.parquet train/), and name that"
            )
        if files:
            return files
    return []


def _split(file: Path) -> str:
    """The split that a file's name tells, or nothing."""
    words = re.split("[^a-z]+", file.stem.lower())
    return next((word for word in words if word in SPLITS), "")


class ParquetIndex(ImageIndex):
    """Parquet files as one data set. root: the file or folder that was named. shards: the files, sorted.

    Raises InputError where pyarrow is missing, and for a file that is damaged or without such columns, naming it.
    """

    kind = "Parquet files"

    def __init__(self, root: Path, shards: list[Path]) -> None:
        labels, names, rows, groups = [], [], [], []
        for shard in tqdm(shards, desc=f"index {root.name}", unit="file", disable=None):
            with _decoding(shard, InputError):
                file = _parquet(shard)
                schema = file.schema_arrow
            _check_columns(shard, schema)
            with _decoding(shard, InputError):
                labels.append(_labels(file.read(["label"], use_threads=False).column(0)))
            _check_labels(shard, labels[-1])
            names.append(_class_names(shard, schema))
            if names[-1] != names[0]:
                raise InputError(f"{shard} has other class names than {shards[0]}: they are not of one data set")
            groups.append(file.num_row_groups)
            rows += [file.metadata.row_group(k).num_rows for k in range(file.num_row_groups)]
        of_image = np.concatenate(labels)
        if not len(of_image):
            raise InputError(f"{root} holds no images: its Parquet files have no rows")
        classes = names[0] or [f"class {k}" for k in range(of_image.max() + 1)]
        if of_image.max() >= len(classes):
            raise InputError(f"{root} has labels up to {of_image.max():,}, and names of {len(classes):,} classes")
        warn_classes(root, classes, np.bincount(of_image, minlength=len(classes)).tolist(), "")
        self._shards, self._sizes = shards, [shard.stat().st_size for shard in shards]
        # the first image of each file and of each row group, and the row groups' numbers in their files
        self._first = np.cumsum([0, *map(len, labels)])[:-1]
        self._begin = np.cumsum([0, *rows])[:-1]
        self._number = np.concatenate([np.arange(count) for count in groups])
        self._kept = _Kept(_KEPT_BYTES)
        super().__init__(root, classes, of_image)

    def path(self, i: int) -> str:
        shard = _at(self._first, i)
        return f"{self._shards[shard]}[{i - self._first[shard]}]"

    def places(self) -> Iterator[bytes]:
        counts = np.diff([*self._first, len(self)])
        for shard, count in zip(self._shards, counts.tolist(), strict=True):
            file = self.below_root(shard)
            yield from (b"%s[%d]" % (file, row) for row in range(count))

    def stored_bytes(self) -> int:
        return sum(self._sizes)

    def holder(self, i: int) -> Path:
        return self._shards[_at(self._first, i)]

    def read(self, i: int) -> bytes:
        group = _at(self._begin, i)
        data = self._kept.get(group, self._images)[i - int(self._begin[group])].as_py()
        if data is None:
            raise OSError(f"{self.path(i)} has no bytes of an image")
        return data

    def _images(self, group: int) -> ChunkedArray:
        """The encoded images of a row group."""
        shard = _at(self._first, int(self._begin[group]))
        path, there = self._shards[shard], self._shards[shard].stat().st_size
        if there != self._sizes[shard]:
            raise InputError(
                f"{path} is not the file that was opened: it has {there:,} bytes, and had {self._sizes[shard]:,}: copy "
                "it again"
            )
        with _decoding(path, OSError):
            file = _parquet(path)
            column = "image.bytes" if _is_struct(file.schema_arrow) else "image"
            return file.read_row_group(int(self._number[group]), [column], use_threads=False).flatten().column(0)


class _Kept:
    """What was made last, up to a number of bytes, and one at least. Safe in threads. It travels to another process
    empty."""

    def __init__(self, room: int) -> None:
        self.room = room
        self._made: OrderedDict[int, ChunkedArray] = OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple:
        return _Kept, (self.room,)

    def get(self, key: int, make: Callable[[int], ChunkedArray]) -> ChunkedArray:
        """What make(key) gives; threads wait for each other here, so that none makes what another is making."""
        with self._lock:
            made = self._made.get(key)
            self._made[key] = made = make(key) if made is None else made
            self._made.move_to_end(key)
            while len(self._made) > 1 and sum(each.nbytes for each in self._made.values()) > self.room:
                self._made.popitem(last=False)
            return made


def _at(begins: np.ndarray, i: int) -> int:
    """Which of the runs that begin there, some of them empty, has image i."""
    return int(np.searchsorted(begins, i, side="right")) - 1


def _parquet(path: Path) -> ParquetFile:
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise InputError(f"reading {path} needs pyarrow: pip install 'pixelgen_fast[parquet]'") from error
    return ParquetFile(path)


@contextmanager
def _decoding(path: Path, kind: type[Exception]) -> Iterator[None]:
    """Raise `kind`, naming the file, for what Arrow cannot decode. What storage does not give has a number, and stays
    as it is."""
    try:
        yield
    except (OSError, ValueError, NotImplementedError) as error:
        if isinstance(error, InputError) or getattr(error, "errno", None) is not None:
            raise
        said = " ".join(str(error).split())
        raise kind(f"{path} is no Parquet file, or is damaged or cut short: {said} Copy it again") from error


def _check_columns(shard: Path, schema: Schema) -> None:
    from pyarrow import types

    columns = {field.name: field.type for field in schema}
    image, label = columns.get("image"), columns.get("label")
    if image is not None and _is_struct(schema):
        image = next((field.type for field in image if field.name == "bytes"), None)
    if not (_is(image, types.is_binary, types.is_large_binary) and _is(label, types.is_integer)):
        there = ", ".join(f"{name} ({kind})" for name, kind in columns.items())
        raise InputError(
            f"{shard} has the columns {there}; it needs image, a struct with the binary field bytes or binary itself, "
            "and label, an integer"
        )


def _is(kind: Any, *tests: Callable[[Any], bool]) -> bool:
    return kind is not None and any(test(kind) for test in tests)


def _is_struct(schema: Schema) -> bool:
    from pyarrow import types

    return types.is_struct(schema.field("image").type)


def _labels(column: ChunkedArray) -> np.ndarray:
    """int64 [rows], -1 where there is none."""
    return column.cast("int64").fill_null(-1).to_numpy()


def _check_labels(shard: Path, labels: np.ndarray) -> None:
    if (bad := np.flatnonzero(labels < 0)).size:
        raise InputError(
            f"{shard}: {bad.size:,} of {labels.size:,} images have no label, or one below 0 (first: row {bad[0]}), as "
            "in a test split: leave the file out"
        )
    if labels.max(initial=0) >= _MOST_CLASSES:
        raise InputError(f"{shard}: label {labels.max():,} is beyond {_MOST_CLASSES:,}: labels must count from 0 on")


def _class_names(shard: Path, schema: Schema) -> list[str] | None:
    """The names that Hugging Face's `datasets` writes into the schema; None where there are none."""
    stored = (schema.metadata or {}).get(b"huggingface", b"{}")
    try:
        names = json.loads(stored).get("info", {}).get("features", {}).get("label", {}).get("names")
    except (ValueError, AttributeError) as error:
        raise InputError(f"{shard}: the schema's metadata of `huggingface` are damaged: {error}") from error
    if not isinstance(names, list | None) or not all(isinstance(name, str) for name in names or ()):
        raise InputError(f"{shard}: the class names in the schema's metadata are no list of names")
    return names
