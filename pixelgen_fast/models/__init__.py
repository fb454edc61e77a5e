"""The generators. A system is one module here, named as its `model.system`, with `Config` and `build`.

What `build` gives offers `blocks()` and `whole_modules()`, for the wrapping in engine/parallel.py and engine/zero.py.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType


def systems() -> list[str]:
    """Names of the available systems, for `model.system`."""
    return sorted(
        name
        for _, name, _ in pkgutil.iter_modules(__path__)
        if hasattr(importlib.import_module(f"{__name__}.{name}"), "build")
    )


def system(name: str) -> ModuleType:
    """The module of a system. Raises ValueError with the valid names for an unknown one."""
    if name not in systems():
        raise ValueError(f"model.system: unknown system {name!r}; valid: {', '.join(systems())}")
    return importlib.import_module(f"{__name__}.{name}")
