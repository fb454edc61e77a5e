"""The compiled CPU bodies: csrc as one shared library, loaded once, refused where it cannot run, and why.

torch.ops.load_library opens it; its operators and their gradients then stand under `torch.ops.pixelgen` for CPU
tensors. PIXELGEN_NATIVE_LIBRARY names another file, for a sanitised or profiled build.
"""

from __future__ import annotations

import functools
import os
import warnings
from pathlib import Path

import torch

from pixelgen_kernels import build

LIBRARY = Path(os.environ.get("PIXELGEN_NATIVE_LIBRARY") or Path(__file__).resolve().parent / build.NAME)


@functools.cache
def has_native() -> bool:
    """Whether the compiled CPU bodies are there; opens them. Says so once when a library is there that cannot run."""
    return not native_problem()


@functools.cache
def native_problem() -> str:
    """Why the compiled CPU bodies cannot run; empty when they can."""
    if not LIBRARY.is_file():
        return "csrc is not compiled; run `pixelgen kernels build`, which needs a C++ compiler"
    try:
        torch.ops.load_library(LIBRARY)
        built_for = torch.ops.pixelgen_native.torch_version()
    except (OSError, RuntimeError) as error:
        problem = f"it cannot be loaded ({error})"
    else:
        if built_for.split("+")[0] == torch.__version__.split("+")[0]:
            return ""
        problem = f"it was compiled for PyTorch {built_for}, this is {torch.__version__}"
    problem = f"{LIBRARY}: {problem}; run `pixelgen kernels build`"
    warnings.warn(problem, RuntimeWarning, stacklevel=2)
    return problem
