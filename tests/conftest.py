"""Settings of every test process."""

import importlib.util
import os
import shutil

# Two pytest workers share two cores; OpenMP threads that wait for each other on a busy core are many times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Kernels run in Triton's interpreter where there is no GPU; it must be chosen before they are imported.
if not os.path.exists("/dev/nvidiactl"):
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu" if not os.path.exists("/dev/nvidiactl") else "cuda")

import pytest
import torch


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests of a GPU, and of pages in a browser, are deselected, visibly, where there is none."""
    there = {
        "gpu": torch.cuda.is_available(),
        "browser": bool(shutil.which("chromium")) and importlib.util.find_spec("playwright") is not None,
    }
    without = [name for name, is_there in there.items() if not is_there]
    left = [item for item in items if any(item.get_closest_marker(name) for name in without)]
    config.hook.pytest_deselected(items=left)
    items[:] = [item for item in items if item not in left]
