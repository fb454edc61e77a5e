"""Measurements for a visit under test: one that works, and each way in which one can fail."""

import os
import sys
import time
from types import SimpleNamespace

# no test of the visit waits for the import of torch
sys.modules["torch"] = SimpleNamespace(cuda=SimpleNamespace(is_available=lambda: False))
sys.modules["machine"] = SimpleNamespace(machine=lambda device: {"machine": f"a {device}"})


def measure(row, device_free, kind):
    if kind == "broken import":
        raise ImportError("no such library")
    device_free()
    if kind == "nothing":
        return
    row(value=1.5)
    if kind == "red":
        row(red="off by far")
    if kind == "hangs":
        time.sleep(1000)
    if kind == "crashes":
        os.abort()
