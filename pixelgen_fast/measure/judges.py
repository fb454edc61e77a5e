"""Who judges drawn images: what is kept of a batch of them, and the report on what is kept of all.

Digits are judged as images (eval/digits.py), all others by features (eval/fid.py), which every rank takes of the
images that it draws: images themselves are not kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from pixelgen_fast.data.roots import open_root
from pixelgen_fast.errors import InputError
from pixelgen_fast.eval.digits import DigitsReport, evaluate_digits
from pixelgen_fast.eval.features import FeatureNetworks
from pixelgen_fast.eval.fid import FidReport, check_reference, judge, open_reference
from pixelgen_fast.eval.reference import Reference

Report = DigitsReport | FidReport
# how numbers become bytes, which no figure is without; see diffusion/solver.py, to_uint8
ROUNDING = "uint8 = 127.5 (x + 1), rounded to the nearest whole number, in [0, 255]"


class Judge(Protocol):
    """count: images to draw where nobody says how many. identity: what it keeps depends on beside the images. against:
    what its report depends on beside what it keeps."""

    count: int
    identity: dict[str, Any]
    against: str

    def keep(self, images: Tensor) -> dict[str, Tensor]:
        """What is kept of a batch uint8 [n, S, S, 3]: tensors [n, ...] by name."""

    def report(self, kept: Mapping[str, Tensor], labels: Tensor) -> Report:
        """The report on what was kept of all images, in their order. labels: int64 [N]."""


class DigitsJudge:
    count, against = 1000, "digits"

    def __init__(self) -> None:
        self.identity: dict[str, Any] = {"judge": "digits"}

    def keep(self, images: Tensor) -> dict[str, Tensor]:
        return {"images": images}

    def report(self, kept: Mapping[str, Tensor], labels: Tensor) -> DigitsReport:
        return evaluate_digits(kept["images"], labels)


class FeatureJudge:
    """reference: a data set or a .npz file. size: of the images that are drawn. Raises as eval/features.py does."""

    count = 50_000

    def __init__(
        self, reference: str, size: int, *, inception: str | None, dino: str | None, device: torch.device | str
    ) -> None:
        self.networks = FeatureNetworks(weights=inception, dino=dino, device=device)
        self.path, self.size = reference, size
        self.opened: Reference | None = None
        self.identity: dict[str, Any] = {"judge": self.networks.about}
        self.against = reference

    def check(self) -> None:
        """Raise what can be said of the reference before images are drawn."""
        self.opened = check_reference(self.path, self.networks, size=self.size)
        self.against = open_root(self.path).fingerprint if self.opened is None else self.opened.about["sha256"]

    def keep(self, images: Tensor) -> dict[str, Tensor]:
        return self.networks(images)

    def report(self, kept: Mapping[str, Tensor], labels: Tensor) -> FidReport:
        if self.opened is None:
            self.opened = open_reference(self.path, self.networks, size=self.size, progress=True)
        return judge(kept, self.opened, self.networks, "drawn")


def need_reference(reference: str | None) -> str:
    """The reference. Raises InputError where there is none."""
    if reference is None:
        raise InputError(
            "evaluating images other than the digits needs --reference, a data set of real images or a statistics .npz"
        )
    return str(Path(reference).expanduser()) if reference.startswith("~") else reference
