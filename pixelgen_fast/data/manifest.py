"""What a packed folder says of itself: how it was made, and checksums to find out whether it still is what was written.

    manifest.json    how: source, size, crop, decoders; what was left out; size and SHA-256 of the small files
    checksums.npy    uint32 [N], the CRC-32 of each image's pixels

Folders of earlier versions have neither, and are read all the same.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import __version__ as pillow_version
from PIL import features

from pixelgen_fast.errors import InputError

MANIFEST, CHECKSUMS = "manifest.json", "checksums.npy"
_VERSION = 1


@dataclass(frozen=True)
class Made:
    """How the images were made: the same `Made` gives the same bytes. fingerprint: of the source (image_index.py)."""

    fingerprint: str
    size: int
    crop: str
    upright: bool
    version: int = _VERSION


@dataclass(frozen=True)
class Manifest:
    """root: of the source. images: packed ones. unreadable: path -> reason of those left out. files: name -> [bytes,
    SHA-256]."""

    made: Made
    decoders: dict[str, str]
    root: str
    images: int
    classes: int
    unreadable: dict[str, str]
    files: dict[str, list[Any]]

    def write(self, folder: Path) -> None:
        (folder / MANIFEST).write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Manifest | None:
        """Of a packed folder; None where there is none. Raises InputError for one that is damaged."""
        path = folder / MANIFEST
        try:
            values = json.loads(path.read_text())
            return cls(**values | {"made": Made(**values["made"])})
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(f"{path} is damaged ({error}): copy or pack the folder again") from error

    def differing(self, folder: Path) -> list[str]:
        """Names of the small files whose bytes are not those that were written."""
        return [name for name, sealed in self.files.items() if sealed != seal(folder / name)]


def seal(path: Path) -> list[Any]:
    """[bytes, SHA-256] of a file; zeros where it is missing."""
    if not path.exists():
        return [0, ""]
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return [path.stat().st_size, digest]


def decoders() -> dict[str, str]:
    """The versions on which the pixels of a decoded image depend."""
    libraries = ("libjpeg_turbo", "webp", "zlib")
    return {"pillow": pillow_version, **{name: str(features.version(name)) for name in libraries}}
