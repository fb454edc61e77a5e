"""Freed memory stays with the process."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from pixelgen_fast.engine.memory import available_memory

PROGRAM = """
import resource, sys
import torch
from pixelgen_fast.engine.memory import keep_freed_memory

if sys.argv[1] == "kept":
    assert keep_freed_memory()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):  # until the heap has grown to where every aligned block fits a freed one
    torch.ones(16 << 20)
before = faults()
for _ in range(10):
    torch.ones(16 << 20)
print(faults() - before)
"""


def test_a_large_tensor_is_made_again_without_new_pages():
    """64 MB are 16384 pages of 4 kB; ten tensors of them fault on every page unless the pages are kept."""
    assert resource.getpagesize() <= 65536
    kept, given_back = (
        int(subprocess.run([sys.executable, "-c", PROGRAM, how], check=True, capture_output=True, text=True).stdout)
        for how in ("kept", "given back")
    )
    assert kept < 100 < given_back


def test_the_host_says_what_it_has():
    assert 2**20 < available_memory() < 2**50


@pytest.mark.parametrize(
    ("line", "files", "left"),
    [
        ("0::/", {}, 800 * 1024),
        ("0::/job", {"job/memory.max": "max", "job/memory.current": "1"}, 800 * 1024),
        ("0::/job/step", {"job/memory.max": "5000", "job/memory.current": "4000",
                          "job/memory.stat": "inactive_file 300"}, 1300),
        (
            "4:memory:/job",
            {
                "memory/job/memory.limit_in_bytes": "5000",
                "memory/job/memory.usage_in_bytes": "6000",
                "memory/job/memory.stat": "cache 9",
            },
            0,
        ),
    ],
)  # fmt: skip
def test_a_container_has_what_its_group_leaves(tmp_path: Path, line: str, files: dict[str, str], left: int) -> None:
    files = {f"sys/fs/cgroup/{name}": text for name, text in files.items()}
    files |= {"proc/self/cgroup": line + "\n", "proc/meminfo": "MemTotal: 900 kB\nMemAvailable: 800 kB\n"}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert available_memory(tmp_path) == left
