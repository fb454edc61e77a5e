"""The GPUs that a plan is for: those of cards.json, each number with its source, or one that a file describes.

    {"gpu": "NVIDIA H200", "tflop_per_s": 789, "tb_per_s": 4.24}

`tflop_per_s` and `tb_per_s` are measured ceilings, of matrix products and of a copy, as benchmarks/machine.py takes
them. What the file does not say is that of the card of the table whose name the GPU bears; a GPU that is in no table
has no data sheet here, and so no share of one. Rates of links are of one direction, those of networks of one GPU.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pixelgen_fast.errors import InputError
from pixelgen_fast.planning.rates import Rates

TABLE = Path(__file__).parent / "cards.json"
CEILINGS = ("tflop_per_s", "tb_per_s")
SHEET = ("data_sheet_tflop_per_s", "data_sheet_tb_per_s")
OTHERS = (
    "memory_gb",
    "link_gb_per_s",
    "network_gb_per_s",
    "power_w",
    "instructions",
    "float32_tflop_per_s",
    "jpeg_images_per_s",
)


@dataclass(frozen=True)
class Card:
    """A GPU in FLOP/s, bytes and bytes/s; None for what is not known of it.

    sheet: (matrix products, memory) of its data sheet. ceilings: the same, measured. instructions: how fast it issues
    them, as a share of an H100. float32: products in it, as a share of those in bf16. jpeg_images: that its JPEG
    engines decode in a second. sources: of each number.
    """

    name: str
    sheet: tuple[float, float] | None
    ceilings: tuple[float, float] | None
    memory: float | None
    link: float | None
    network: float | None
    power: float | None
    instructions: float
    float32: float
    jpeg_images: float | None
    sources: dict[str, str]

    @property
    def limits(self) -> Rates:
        """What no step passes: the measured ceilings where there are any, else the data sheet."""
        return Rates(*(self.ceilings or self.sheet), self.instructions, self.float32)


@cache
def table() -> dict[str, dict[str, Any]]:
    return json.loads(TABLE.read_text())


def find_card(given: str) -> Card:
    """A card of the table by its name, or of a JSON file. Raises InputError, in one line, for what is neither."""
    if given.lower() in table():
        entry = table()[given.lower()]
        return _card(entry, dict(entry["sources"]), given)
    path = Path(given)
    if not path.is_file():
        raise InputError(
            f"--gpu {given}: no such card and no such file; use one of {', '.join(table())}, or a JSON file with gpu, "
            f"{', '.join(CEILINGS)}"
        )
    return _read(path)


def _read(path: Path) -> Card:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"--gpu {path}: no readable JSON file ({error})") from error
    needed = ("gpu", *CEILINGS)
    if not isinstance(content, dict) or (missing := [key for key in needed if key not in content]):
        lacks = ", ".join(missing) if isinstance(content, dict) else "an object"
        raise InputError(f"--gpu {path}: lacks {lacks}; it needs {', '.join(needed)}, and may have {', '.join(OTHERS)}")
    if not isinstance(content["gpu"], str):
        raise InputError(f"--gpu {path}: gpu is {content['gpu']!r}; it must be the name of the card")
    known = next((e for key, e in table().items() if key in content["gpu"].lower()), {"sources": {}})
    sources = known["sources"] | {key: str(path) for key in content}
    said = {key: value for key, value in content.items() if key in (*CEILINGS, *SHEET, *OTHERS)}
    return _card(known | {"gpu": content["gpu"]} | said, sources, str(path))


def _card(entry: dict[str, Any], sources: dict[str, str], given: str) -> Card:
    for key in (*CEILINGS, *SHEET, *OTHERS):
        value = entry.get(key)
        if value is not None and not (type(value) in (int, float) and 0 < value < float("inf")):
            raise InputError(f"--gpu {given}: {key} is {value!r}; it must be a number above 0")
    # what is not known is as on an H100
    sheet = entry.get(SHEET[0]) or entry[CEILINGS[0]]
    giga = {key: entry[key] * 1e9 if key in entry else None for key in OTHERS[:3]}
    return Card(
        name=entry["gpu"],
        sheet=_pair(entry, SHEET),
        ceilings=_pair(entry, CEILINGS),
        memory=giga["memory_gb"],
        link=giga["link_gb_per_s"],
        network=giga["network_gb_per_s"],
        power=entry.get("power_w"),
        instructions=entry.get("instructions", 1.0),
        float32=entry.get("float32_tflop_per_s", 67 / 989 * sheet) / sheet,
        jpeg_images=entry.get("jpeg_images_per_s"),
        sources=sources,
    )


def _pair(entry: dict[str, Any], keys: tuple[str, str]) -> tuple[float, float] | None:
    products, memory = (entry.get(key) for key in keys)
    return None if products is None or memory is None else (products * 1e12, memory * 1e12)
