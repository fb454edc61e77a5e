"""Look through a data set before training on it: decode every image and report what the loader would replace.

Of a packed folder every image's checksum is compared as well.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np

from pixelgen_fast.data.cache import published_file
from pixelgen_fast.data.each import each
from pixelgen_fast.data.encoded import UnreadableImage, is_turned, load
from pixelgen_fast.data.image_index import ImageIndex
from pixelgen_fast.data.index import open_index

_SIDES = (32, 64, 128, 256, 512, 1024, 2048)


@dataclass
class ScanReport:
    """What a data set holds.

    classes: name -> images. unreadable: path -> reason. formats, modes: as PIL names them -> readable images.
    shorter_side: "below 64" and so on -> readable images. turned: readable images whose EXIF asks for a rotation or
    mirroring, which neither ADM nor the loader applies. checksums: of a packed folder, in words.
    """

    root: str
    images: int
    classes: dict[str, int]
    unreadable: dict[str, str] = field(default_factory=dict)
    formats: dict[str, int] = field(default_factory=dict)
    modes: dict[str, int] = field(default_factory=dict)
    shorter_side: dict[str, int] = field(default_factory=dict)
    turned: int = 0
    checksums: str | None = None

    def lines(self) -> list[str]:
        """The report in words, one line each."""
        bad = [f"    {path}: {reason}" for path, reason in self.unreadable.items()]
        counts = sorted(self.classes.values())
        return [
            f"{self.root}: {self.images:,} images in {len(self.classes):,} classes "
            f"({counts[0]:,} to {counts[-1]:,} a class), {len(bad):,} unreadable",
            *bad,
            *([] if self.checksums is None else [f"checksums       {self.checksums}"]),
            "formats         " + _counts(self.formats),
            "colour modes    " + _counts(self.modes),
            "shorter side    " + _counts(self.shorter_side),
            f"EXIF rotation   {self.turned:,} images (not applied in training; `data pack --upright` does)",
        ]


def scan(root: str | Path, *, out: str | Path | None = None, workers: int | None = None) -> ScanReport:
    """Decode every image below `root` (anything `open_index` takes) and report; write the report as JSON to `out`.

    workers: as `each` takes them. Raises what open_index and `each` raise.
    """
    index = open_index(root)
    counts = np.bincount(index.labels, minlength=len(index.classes)).tolist()
    report = ScanReport(str(index.root), len(index), dict(zip(index.classes, counts, strict=True)))
    report.checksums = index.checked()
    formats: Counter[str] = Counter()
    modes: Counter[str] = Counter()
    sides: Counter[str] = Counter()
    for i, seen in each(index, partial(_look, index), workers=workers, title="scan"):
        if isinstance(seen, str):
            report.unreadable[index.path(i)] = seen
            continue
        format, mode, side, turned = json.loads(seen.tobytes())
        formats[format] += 1
        modes[mode] += 1
        sides[side] += 1
        report.turned += turned
    report.formats, report.modes = dict(formats.most_common()), dict(modes.most_common())
    report.shorter_side = {name: sides[name] for name in _side_names() if sides[name]}
    if out is not None:
        with published_file(Path(out)) as work:
            work.write_text(json.dumps(asdict(report), indent=2) + "\n")
    return report


def _look(index: ImageIndex, i: int, data: bytes) -> bytes:
    """(format, mode, shorter side, asks for rotation) of image i, as JSON. Raises UnreadableImage."""
    if reason := index.damage(i, data):
        raise UnreadableImage(reason)
    image = load(data)
    side = _side_names()[sum(min(image.size) >= edge for edge in _SIDES)]
    return json.dumps((str(image.format), image.mode, side, is_turned(image))).encode()


def _side_names() -> list[str]:
    return [f"below {_SIDES[0]}"] + [f"{low} to {high - 1}" for low, high in pairwise(_SIDES)] + [f"from {_SIDES[-1]}"]


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name}: {count:,}" for name, count in counts.items()) or "none"
