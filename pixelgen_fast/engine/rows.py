"""Lines of JSON in a file that may be away for a while: a full disk, a share that is gone, a deleted folder."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


class RowFile:
    """append(row): the row is in the file, or kept and tried again with the next one; what failed is said once.

    say: takes a line for people. A number that is not finite is null: JSON has none.
    """

    def __init__(self, path: Path, say: Callable[[str], None]) -> None:
        self.path, self.say = path, say
        self.kept: list[str] = []

    def append(self, row: Mapping[str, Any]) -> None:
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        self.kept.append(json.dumps(finite, allow_nan=False) + "\n")
        self._write()

    def close(self) -> None:
        """Try once more; say how many rows are lost."""
        if self.kept and not self._write():
            self.say(f"{len(self.kept)} rows are not in {self.path}")

    def _write(self) -> bool:
        before = len(self.kept)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab", buffering=0) as file:
                whole, text = file.tell(), "".join(self.kept).encode()
                try:
                    if file.write(text) != len(text):
                        raise OSError(f"{self.path}: no room for a row")
                except OSError:
                    os.ftruncate(file.fileno(), whole)  # no half row
                    raise
        except OSError as error:
            if before == 1:
                self.say(f"a row of metrics cannot be written and is kept for the next time, the run goes on: {error}")
            return False
        if before > 1:
            self.say(f"{before} rows of metrics that were kept are in {self.path}")
        self.kept.clear()
        return True
