"""What a machine without a network may lack: collected as wheels in .gpu/ beforehand, unpacked there where missing.

An installed package is never shadowed: a wheel is used only where its package cannot be imported. Unpacking a wheel is
all that an import needs, so no installer runs and nothing of the machine changes. .gpu/commit holds the commit, for a
copy of this folder that is not a repository.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from gpu.visit import ROOT

FOLDER = ROOT / ".gpu"
# DeepSpeed and configurations with what they need beyond torch, numpy, einops, PyYAML; libraries to compare with
PURE = (
    "deepspeed==0.19.8",
    "omegaconf==2.4.0",
    "hjson",
    "pydantic",
    "annotated-types",
    "typing-inspection",
    "liger-kernel",
)
COMPILED = ("pydantic-core", "xformers==0.0.35")
PYTHON, PLATFORMS = "3.12", ("manylinux_2_17_x86_64", "manylinux2014_x86_64", "manylinux_2_28_x86_64")


def collect() -> None:
    """Fill .gpu/ with wheels for a machine with Python 3.12 on x86-64, and this commit."""
    FOLDER.mkdir(exist_ok=True)
    for old in FOLDER.glob("*.whl"):
        old.unlink()
    pip = [sys.executable, "-m", "pip", "-q"]
    subprocess.run([*pip, "wheel", "--no-deps", "-w", str(FOLDER), *PURE], check=True)
    target = ["--only-binary=:all:", "--python-version", PYTHON, "--implementation", "cp", "--abi", "cp312"]
    target += ["--abi", "abi3", "--abi", "none", *(word for name in PLATFORMS for word in ("--platform", name))]
    for name in (_requirement(next(FOLDER.glob("pydantic-*.whl")), "pydantic-core"), *COMPILED):
        subprocess.run([*pip, "download", "--no-deps", "-d", str(FOLDER), *target, name], check=True)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True, cwd=ROOT)
    changed = subprocess.run(["git", "status", "--porcelain"], capture_output=True, text=True, check=True, cwd=ROOT)
    (FOLDER / "commit").write_text(commit.stdout.strip() + (" and changes" if changed.stdout.strip() else "") + "\n")
    for path in sorted(FOLDER.iterdir()):
        print(f"{path.stat().st_size / 1e6:7.2f} MB {path.relative_to(ROOT)}")


def unpacked() -> list[str]:
    """A folder with the packages of .gpu/ that cannot be imported here, to be looked in; [] where none is missing."""
    missing = [wheel for wheel in sorted(FOLDER.glob("*.whl")) if _fits(wheel) and not _importable(wheel)]
    if not missing:
        return []
    folder = Path(tempfile.mkdtemp(prefix="gpu_day_"))
    for wheel in missing:
        zipfile.ZipFile(wheel).extractall(folder)
    return [str(folder)]


def _fits(wheel: Path) -> bool:
    """Whether the tags of the file's name are of this Python: py3, py39 or cp312 for 3.12, or any stable ABI."""
    pythons, abi, _ = wheel.stem.split("-")[-3:]
    minor = sys.version_info.minor
    generic = [tag[3:] for tag in pythons.split(".") if tag.startswith("py3")]
    return f"cp3{minor}" in pythons.split(".") or abi == "abi3" or any(int(tag or 0) <= minor for tag in generic)


def _importable(wheel: Path) -> bool:
    with zipfile.ZipFile(wheel) as content:
        tops = {name.split("/")[0] for name in content.namelist() if name.endswith(("/__init__.py", "/__init__.pyi"))}
        names = {top for top in tops if top.isidentifier()}
    return all(importlib.util.find_spec(name) is not None for name in names)


def _requirement(wheel: Path, name: str) -> str:
    """What a wheel says of one of its needs, such as "pydantic-core==2.50.5"."""
    with zipfile.ZipFile(wheel) as content:
        metadata = next(member for member in content.namelist() if member.endswith(".dist-info/METADATA"))
        lines = content.read(metadata).decode().splitlines()
    found = next(line for line in lines if line.startswith(f"Requires-Dist: {name}"))
    return found.split(": ", 1)[1].split(";")[0].replace(" ", "")
