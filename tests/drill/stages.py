"""What is planted into a process before its command begins: death in a stage of a checkpoint, a clock that jumps."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

STAGES = ("prepare", "shard", "half a shard", "state", "manifest", "before the rename", "after the rename", "prune")


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at(count: int, instead: Callable[..., Any], real: Callable[..., Any]) -> Callable[..., Any]:
    """`real`, but `instead` at the count-th call."""
    calls = 0

    def called(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        return (instead if calls == count else real)(*arguments, **named)

    return called


def plant(stage: str, count: int) -> None:
    """Put the death into this process's code that writes checkpoints: at the count-th time in the stage."""
    from pixelgen_fast.runs import checkpoint

    def half(folder: Path, rank: int, shards: Any) -> None:
        written = whole(folder, rank, shards)
        for name in written[0]:
            os.truncate(folder / name, (folder / name).stat().st_size // 2)
        die()

    def renamed(source: Path, target: Path) -> None:
        os.rename(source, target)
        die()

    class Os:
        """The module, with another rename."""

        def __getattr__(self, name: str) -> Any:
            return rename if name == "rename" else getattr(os, name)

    whole = checkpoint.write_shards
    if stage == "half a shard":
        checkpoint.write_shards = at(count, half, whole)
    elif stage in ("before the rename", "after the rename"):
        rename = at(count, die if stage.startswith("before") else renamed, os.rename)
        checkpoint.os = Os()
    else:
        names = {"prepare": "_prepare", "shard": "write_shards", "state": "seal", "manifest": "write_manifest"}
        name = names.get(stage, "_prune")
        setattr(checkpoint, name, at(count, die, getattr(checkpoint, name)))


def plant_clock(first: float, second: float) -> None:
    """Move this process's wall clock by `first` seconds after a second, and by `second` more after another one."""
    real, begin = time.time, time.monotonic()

    def jumping() -> float:
        seconds = time.monotonic() - begin
        return real() + (first if seconds > 1 else 0) + (second if seconds > 2 else 0)

    time.time = jumping
