"""Whose weights a model contains, and under which licence they are: conversion and further training change neither.

The words are those of a reader, not of a lawyer; the text at the link counts.
"""

from __future__ import annotations

from typing import NamedTuple

from pixelgen_fast.errors import InputError


class Licence(NamedTuple):
    """of: the weights. id: the hub's for the licence, "other" for one of its own, None where none was granted."""

    of: str
    id: str | None
    name: str
    link: str
    terms: str

    def line(self) -> str:
        """One line for a reader."""
        return f"{self.of}: {self.name}, {self.terms}; {self.link}"


_HUB = "https://huggingface.co"
_NONE = "no licence was published, so there is no grant to use, change or pass them on"
# by the system of interop/ that reads them
PUBLISHED = {
    "pixeldit": Licence(
        "PixelDiT's published weights", "other", "NVIDIA Source Code License (NSCLv1)",
        f"{_HUB}/nvidia/PixelDiT-ImageNet", "for research and evaluation, not commercially",
    ),
    "jit": Licence(
        "JiT's published weights", "mit", "MIT", "https://github.com/LTH14/JiT", "with the authors' notice kept"
    ),
    "deco": Licence("DeCo's published weights", None, "no licence", f"{_HUB}/zehongma/DeCo", _NONE),
    "ditdh": Licence(
        "RAE's published weights", "mit", "MIT", "https://github.com/bytetriper/RAE", "with the authors' notice kept"
    ),
    "raev2": Licence(
        "RAEv2's published weights", "cc-by-nc-4.0", "CC BY-NC 4.0",
        "https://creativecommons.org/licenses/by-nc/4.0/", "not commercially, with the authors named",
    ),
    "fractal": Licence(
        "FractalGen's published weights", "mit", "MIT", "https://github.com/LTH14/fractalgen",
        "with the authors' notice kept",
    ),
    "mar": Licence(
        "MAR's published weights", "mit", "MIT", "https://github.com/LTH14/mar", "with the authors' notice kept"
    ),
    "alitok": Licence("AliTok's published weights", None, "no licence", "https://github.com/ali-vilab/alitok", _NONE),
}  # fmt: skip
_DINO = {
    "dinov3": (
        "other", "DINOv3 License", "https://ai.meta.com/resources/models-and-libraries/dinov3-license/",
        "commercially too, under Meta's conditions, with the licence passed on",
    ),
    "dinov2": (
        "apache-2.0", "Apache 2.0", "https://github.com/facebookresearch/dinov2", "with the notices kept",
    ),
}  # fmt: skip


def of_published(system: str) -> Licence:
    """The licence of a system's published weights. Raises InputError for a name that has none here."""
    if system not in PUBLISHED:
        raise InputError(f"published weights of {system!r}: their licence is not known here; update pixelgen_fast")
    return PUBLISHED[system]


def of_network(name: str | None) -> Licence | None:
    """The licence of a DINO by timm's name; None for another network, and for none."""
    for kind, (identity, title, link, terms) in _DINO.items():
        if name is not None and kind in name:
            return Licence(f"Meta's {name}", identity, title, link, terms)
    return None
