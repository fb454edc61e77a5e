"""Images a second of a core: the loader, and what else could load the same files, taking turns in one run.

A sample of the readable images is put into a folder of files, from which all of them read; it stays in the system's
memory, so that decoding is measured and not a disk. Each has a process of its own that may use so many cores and waits
while the others have their turn. What else the machine does meets all alike: a ratio is the median over the turns, and
images of a second of processor time hardly depend on it.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from pixelgen_fast.data.encoded import UnreadableImage, inspect
from pixelgen_fast.data.image_index import ImageIndex
from pixelgen_fast.data.order import position
from pixelgen_fast.data.readers import signals_withheld
from pixelgen_fast.data.rivals import PROVIDERS, Job, serve
from pixelgen_fast.data.storage import read_bytes
from pixelgen_fast.errors import InputError

OURS = "loader"
# at least so many times as fast as those whose names begin so
FLOORS = {"DALI": 0.9, "torchvision": 1.0}
_BUSY = 0.8  # of its cores that the loader must get for its figures to be the machine's
_ENDINGS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
_context = multiprocessing.get_context("spawn")


@dataclass
class Row:
    """One provider on some cores. rates: images a second of each turn; busy: of a second of processor time. absent: why
    there are none."""

    provider: str
    cores: int
    rates: list[float] = field(default_factory=list)
    busy: list[float] = field(default_factory=list)
    absent: str = ""

    def cells(self, ours: Row) -> list[str]:
        if self.absent:
            return [self.provider, str(self.cores), f"none: {self.absent.splitlines()[0][:80]}", "", "", "", ""]
        middle, ratio = statistics.median(self.rates), self.ratio(ours)
        return [
            self.provider,
            str(self.cores),
            f"{middle:.0f}",
            f"{min(self.rates):.0f} to {max(self.rates):.0f}",
            f"{middle / self.cores:.0f}",
            f"{statistics.median(self.busy):.0f}",
            "" if ratio is None else f"{ratio:.2f}",
        ]

    def ratio(self, ours: Row) -> float | None:
        """How many times as fast the loader is; None where one of the two was not measured."""
        if not (self.rates and ours.rates):
            return None
        return statistics.median(a / b for a, b in zip(ours.rates, self.rates, strict=True))


@dataclass
class BenchReport:
    """rows: by cores, in the order of the turns. total: cores that this process may use. per_gpu: images a second."""

    root: str
    size: int
    images: int
    mean_bytes: float
    rows: list[Row]
    total: int
    per_gpu: float

    def lines(self) -> list[str]:
        """A Markdown table, and what follows from it."""
        head = ["", "cores", "images/s, median", "lowest to highest", "of a core", "of a second of processor time"]
        table = [[*head, f"{OURS} is faster by"], ["---"] * 7, *(row.cells(self._ours(row.cores)) for row in self.rows)]
        return [
            f"{self.root}: {self.images:,} of its images, {self.mean_bytes / 1e3:.1f} kB each, to {self.size} pixels",
            *(f"| {' | '.join(cells)} |" for cells in table),
            *self._floors(),
            self.verdict(),
        ]

    def verdict(self) -> str:
        """How many GPUs the cores of this machine feed."""
        ours = max((row for row in self.rows if row.provider == OURS), key=lambda row: row.cores)
        if ours.absent:
            raise InputError(f"the loader gave nothing: {ours.absent}")
        of_core = statistics.median(ours.rates) / ours.cores
        fed = of_core * self.total / self.per_gpu
        had = statistics.median(rate / busy for rate, busy in zip(ours.rates, ours.busy, strict=True)) / ours.cores
        return (
            f"{self.total} cores at {of_core:.0f} images/s feed {math.floor(fed):,} GPUs at {self.per_gpu:.0f} "
            f"images/s each ({fed:.2f}); one of them needs {self.per_gpu / of_core:.1f} cores"
            + f". The machine was busy: the loader had {had:.0%} of its cores"
            * (had < _BUSY)
        )

    def _ours(self, cores: int) -> Row:
        return next(row for row in self.rows if row.provider == OURS and row.cores == cores)

    def _floors(self) -> Iterator[str]:
        for row in self.rows:
            floor = next((limit for name, limit in FLOORS.items() if row.provider.startswith(name)), None)
            ratio = row.ratio(self._ours(row.cores))
            if floor is not None and ratio is not None and ratio < floor:
                yield f"below the floor of {floor:g} times {row.provider} on {row.cores} cores: {ratio:.2f}"


def bench(
    index: ImageIndex,
    size: int,
    *,
    per_gpu: float,
    cores: Sequence[int] = (1, 2),
    turns: int = 5,
    seconds: float = 1.0,
    images: int = 1024,
    batch: int = 32,
    providers: Sequence[str] = tuple(PROVIDERS),
) -> BenchReport:
    """Measure on each number of `cores` that there is, in `turns` turns of `seconds` each.

    size: pixels a side. per_gpu: images a second that a GPU trains. images: how many of the data set are used.
    Raises InputError for numbers that are not above 0, for a packed data set, of which nothing is decoded, and where no
    image is readable.
    """
    _check(index, size, per_gpu, turns, seconds, images, batch)
    free = sorted(os.sched_getaffinity(0))
    if not any(0 < count <= len(free) for count in cores):
        raise InputError(f"cores {', '.join(map(str, cores))}: this process may use 1 to {len(free)}")
    with tempfile.TemporaryDirectory(prefix="pixelgen-bench-") as folder:
        sizes = _sample(index, Path(folder), images)
        counts = sorted({count for count in cores if 0 < count <= len(free)})
        rows = [Row(name, count) for count in counts for name in providers]
        with tqdm(total=len(rows) * turns, desc="bench", unit="turn", disable=None) as bar:
            for count in counts:
                _take_turns(
                    [row for row in rows if row.cores == count],
                    Job(folder, size, batch, tuple(free[:count])),
                    turns,
                    seconds,
                    bar,
                )
    return BenchReport(str(index.root), size, len(sizes), statistics.mean(sizes), rows, len(free), per_gpu)


def _check(index: ImageIndex, size: int, per_gpu: float, turns: int, seconds: float, images: int, batch: int) -> None:
    given = {"size": size, "per_gpu": per_gpu, "turns": turns, "seconds": seconds, "images": images, "batch": batch}
    for name, value in given.items():
        if not 0 < value < math.inf:
            raise InputError(f"{name} {value} must be above 0")
    if index.size is not None:
        raise InputError(f"{index.root} is packed: nothing is decoded there; name what it was packed from")


def _sample(index: ImageIndex, folder: Path, most: int) -> list[int]:
    """Write up to `most` readable images, drawn at random, as files; returns their sizes."""
    sizes: list[int] = []
    for number in range(len(index)):
        if len(sizes) == most:
            break
        i = position(0, number, len(index))
        try:
            data = read_bytes(index, i)
            header = inspect(data)
        except UnreadableImage:
            continue
        if header.direct and header.format in _ENDINGS:
            place = folder / f"{index.label(i):06d}" / f"{number:09d}.{_ENDINGS[header.format]}"
            place.parent.mkdir(exist_ok=True)
            place.write_bytes(data)
            sizes.append(len(data))
    if not sizes:
        raise InputError(f"none of the {len(index):,} images of {index.root} can be read: see `pixelgen data scan`")
    return sizes


def _take_turns(rows: list[Row], job: Job, turns: int, seconds: float, bar: tqdm) -> None:
    with ExitStack() as running:
        pipes = {}
        for row in rows:
            pipe = running.enter_context(_process(row.provider, job))
            try:
                row.absent = pipe.recv()
            except EOFError:
                row.absent = "its process has ended"
            if not row.absent:
                pipes[row.provider] = pipe
        for _ in range(turns):
            for row in rows:
                if row.provider in pipes:
                    pipes[row.provider].send(seconds)
                    images, took, busy = pipes[row.provider].recv()
                    row.rates.append(images / took)
                    row.busy.append(images / max(busy, 1e-9))
                bar.update()


@contextmanager
def _process(name: str, job: Job) -> Iterator[multiprocessing.connection.Connection]:
    """A process that serves a provider; it ends when its pipe is closed."""
    mine, its = _context.Pipe()
    process = _context.Process(target=serve, args=(its, name, job))
    with signals_withheld():
        process.start()
    its.close()
    try:
        yield mine
    finally:
        mine.close()
        process.join(10)
        process.kill()
        process.join()
