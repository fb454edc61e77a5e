"""What is kept of drawn images while an evaluation is under way: a file a batch, so that a stopped one goes on.

.evaluation-<checksum of all that they depend on>/
    000042.npz    of batch 42: what the judge keeps of its images, and the seconds that drawing them took

So another evaluation beside this one has a folder of its own. The ranks of one share it, and it is removed when the
report is there.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pixelgen_fast.atomic import replaced
from pixelgen_fast.errors import InputError

_SECONDS = "seconds"


class Parts:
    """The batches of one evaluation. within: the folder of its results. identity: plain types, all they depend on."""

    def __init__(self, within: Path, identity: dict[str, Any]) -> None:
        text = json.dumps(identity, sort_keys=True)
        self.folder = within / f".evaluation-{hashlib.sha256(text.encode()).hexdigest()[:16]}"

    def there(self) -> list[int]:
        """The batches that an earlier command has left."""
        return sorted(int(path.stem) for path in self.folder.glob("[0-9]*.npz"))

    def write(self, batch: int, kept: dict[str, Tensor], seconds: float) -> None:
        with replaced(self._path(batch)) as work, work.open("wb") as file:
            np.savez(file, **{name: values.numpy() for name, values in kept.items()}, **{_SECONDS: seconds})

    def collect(self, count: int) -> tuple[dict[str, Tensor], float]:
        """What was kept of `count` batches, in their order, and the seconds that drawing took in all.

        Raises InputError where one is missing: the ranks do not share the folder.
        """
        found: dict[str, list[np.ndarray]] = {}
        seconds = 0.0
        for batch in range(count):
            path = self._path(batch)
            if not path.is_file():
                raise InputError(f"{path} is missing: all ranks write to {self.folder}, which they must share")
            with np.load(path, allow_pickle=False) as file:
                seconds += float(file[_SECONDS])
                for name in file.files:
                    if name != _SECONDS:
                        found.setdefault(name, []).append(file[name])
        return {name: torch.from_numpy(np.concatenate(parts)) for name, parts in found.items()}, seconds

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, batch: int) -> Path:
        return self.folder / f"{batch:06d}.npz"
