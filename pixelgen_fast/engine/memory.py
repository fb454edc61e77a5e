"""Host memory: what a step frees, the next one takes again; and how much there is to hold checkpoints in."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

# mallopt's names for them, from glibc's malloc.h
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_LARGEST, _TOP_PAD = 2**31 - 1, 64 * 1024 * 1024


def keep_freed_memory() -> bool:
    """Have the C library keep freed memory for the next allocation; returns whether it is glibc, which can.

    By default glibc maps every block of some megabytes afresh and gives it back when it is freed, so that a training
    step on a CPU touches thousands of new pages, each zeroed by the kernel first.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, _LARGEST) and mallopt(_M_TOP_PAD, _TOP_PAD))


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes that this process can still take without swapping or being killed; None where the system does not tell.

    The least of what the host has and what is left to each control group, of a container or job, that holds the
    process. root: where /proc and /sys are.
    """
    found = [_host_memory(root)] + [_group_memory(folder) for folder in _groups(root)]
    return min((free for free in found if free is not None), default=None)


def _host_memory(root: Path) -> int | None:
    with suppress(OSError, ValueError, IndexError):
        for line in (root / "proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


def _groups(root: Path) -> Iterator[Path]:
    """Folders of the control groups that limit this process's memory, of either version, outwards."""
    with suppress(OSError, ValueError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers in ("", "memory"):
                top = root / "sys/fs/cgroup" / controllers
                group = top / path.lstrip("/")
                yield from (folder for folder in (group, *group.parents) if folder.is_relative_to(top))


def _group_memory(folder: Path) -> int | None:
    """What is left to a control group, with what the kernel can drop of its files; None where it has no limit."""
    for limit, usage in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
        with suppress(OSError, ValueError):  # a limit that is "max" is none
            left = int((folder / limit).read_text()) - int((folder / usage).read_text())
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            return max(0, left + int(stat.get("inactive_file", 0)))
    return None
