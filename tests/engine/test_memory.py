"""Freed memory stays with the process."""

import resource
import subprocess
import sys

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
