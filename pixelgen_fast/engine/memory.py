"""Host memory: what a step frees, the next one takes again; and how much there is to hold checkpoints in."""

from __future__ import annotations

import ctypes
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


def available_memory() -> int | None:
    """Bytes that processes of this host can still take without swapping; None where the system does not tell."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return None
