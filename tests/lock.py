"""Pinned versions of all that an installation has: `python -m tests.lock > configs/cluster/requirements.lock`.

The packages are those that setup.py asks for with EXTRAS below, those of ALSO, and all that these ask for, as they are
installed here.
"""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
LOCK = ROOT / "configs" / "cluster" / "requirements.lock"
EXTRAS = ("cuda13", "eval", "hub", "parquet", "teacher", "decoder")
ALSO = ("setuptools", "wheel", "tensorboard")
LINE = (
    "python3 -m venv .venv && .venv/bin/pip install -q -r configs/cluster/requirements.lock && "
    ".venv/bin/pip install -q --no-deps --no-build-isolation -e ."
)
HEAD = """\
# One environment in one line, on Linux with Python {python}; made by `python -m tests.lock` of an installation that
# passed the tests. It has the extras {extras}, and tensorboard.
#   {line}
"""


def wanted() -> list[Requirement]:
    """What setup.py asks for with EXTRAS, and ALSO."""
    import runpy

    import setuptools

    given: dict[str, object] = {}
    kept = setuptools.setup
    setuptools.setup = lambda **arguments: given.update(arguments)
    try:
        runpy.run_path(str(ROOT / "setup.py"))
    finally:
        setuptools.setup = kept
    extras = given["extras_require"]
    texts = [*given["install_requires"], *ALSO, *(text for name in EXTRAS for text in extras[name])]
    return [Requirement(text) for text in texts]


def closure(requirements: list[Requirement]) -> dict[str, str]:
    """{name: version} of the requirements and of all that they ask for, as installed."""
    found: dict[str, str] = {}
    asked = set()
    queue = list(requirements)
    while queue:
        requirement = queue.pop()
        key = (canonicalize_name(requirement.name), frozenset(requirement.extras))
        if key in asked:
            continue
        asked.add(key)
        try:
            installed = distribution(requirement.name)
        except PackageNotFoundError:
            sys.exit(f"{requirement} is not installed here, and its version cannot be pinned")
        found[key[0]] = installed.version.partition("+")[0]
        for text in installed.requires or ():
            inner = Requirement(text)
            extras = requirement.extras or {""}
            if inner.marker is None or any(inner.marker.evaluate({"extra": extra}) for extra in extras):
                queue.append(inner)
    return found


if __name__ == "__main__":
    needed = [r for r in wanted() if r.marker is None or r.marker.evaluate()]
    print(
        HEAD.format(python=f"{sys.version_info[0]}.{sys.version_info[1]}", extras=", ".join(EXTRAS), line=LINE), end=""
    )
    for name, version in sorted(closure(needed).items()):
        print(f"{name}=={version}")
