"""Settings of every test process."""

import os

# Two pytest workers share two cores; OpenMP threads that wait for each other on a busy core are many times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Kernels run in Triton's interpreter where there is no GPU; it must be chosen before they are imported.
if not os.path.exists("/dev/nvidiactl"):
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu" if not os.path.exists("/dev/nvidiactl") else "cuda")

import pytest
import torch


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests of a GPU are deselected, visibly, where there is none."""
    if torch.cuda.is_available():
        return
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    config.hook.pytest_deselected(items=gpu)
    items[:] = [item for item in items if item not in gpu]
