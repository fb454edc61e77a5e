"""What a data root is, how much of it there is, and what its index costs; opening it writes the index that is kept."""

from __future__ import annotations

import pickle
import time
from dataclasses import dataclass
from pathlib import Path

from pixelgen_fast.data.image_index import ImageIndex
from pixelgen_fast.data.roots import open_root


@dataclass(frozen=True)
class Summary:
    """What `pixelgen data index` says.

    bytes: of the images as they are stored. memory: bytes of the index in each process. seconds: that opening took;
    again: that it takes from what is kept, None where nothing is.
    """

    root: str
    kind: str
    images: int
    classes: int
    bytes: int
    memory: int
    fingerprint: str
    seconds: float
    again: float | None
    kept: Path | None

    def lines(self) -> list[str]:
        """The summary in words, one line each."""
        again = (
            f"opened in {self.seconds:.2f} s, which every start of a run takes: nothing is kept of {self.kind}"
            if self.again is None
            else f"opened in {self.seconds:.2f} s; a run opens it in {self.again:.2f} s, from {self.kept}"
        )
        return [
            f"{self.root}: {self.kind}, {self.images:,} images in {self.classes:,} classes, {self.bytes / 1e9:,.3f} GB",
            f"index        {self.memory / self.images:.1f} bytes of memory an image, {self.memory / 1e6:,.1f} MB",
            f"fingerprint  {self.fingerprint}",
            again,
        ]


def summarise(root: str) -> Summary:
    """Open a root and say what it is. Raises what `open_root` raises."""
    index, seconds = _timed(root)
    again = _timed(root)[1] if index.kept else None
    return Summary(
        root=str(index.root),
        kind=index.kind,
        images=len(index),
        classes=len(index.classes),
        bytes=index.stored_bytes(),
        memory=len(pickle.dumps(index)),  # arrays, which lie in a pickle as they lie in memory
        fingerprint=index.fingerprint,
        seconds=seconds,
        again=again,
        kept=index.kept,
    )


def _timed(root: str) -> tuple[ImageIndex, float]:
    began = time.perf_counter()
    return open_root(root), time.perf_counter() - began
