"""Compile the CPU bodies in csrc into one shared library, with whatever C++ compiler there is.

setup.py runs this on installation; `pixelgen kernels build` runs it again, after another PyTorch was installed or a
compiler. The library has no Python in it: torch.ops.load_library opens it and its operators register themselves.

PyTorch's headers take as long to read as an operator's file to compile. So there are as many translation units as
cores, up to MOST, each the includes of several files, and they are compiled at the same time.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

NAME = "_native.so"
MATHS = ("-fno-math-errno", "-fno-trapping-math")  # what vectorisation needs and NaN survives
FLAGS = ("-std=c++20", "-O3", "-fopenmp", *MATHS, "-fPIC", "-fvisibility=hidden")
MOST = 4  # units; the largest file alone takes as long as a quarter of all


class BuildError(RuntimeError):
    """The library could not be built; the message says what was missing or what the compiler said."""


def sources() -> Path:
    """The folder csrc: beside the kernels in a checkout, inside the package in a wheel. Raises BuildError."""
    here = Path(__file__).resolve().parent
    for folder in (here / "csrc", here.parents[1] / "csrc"):
        if (folder / "native.cpp").is_file():
            return folder
    raise BuildError(f"csrc/native.cpp is neither in {here} nor in {here.parents[1]}; reinstall the package")


def compiler() -> str:
    """The C++ compiler: $CXX, or c++, g++ or clang++ on the path. Raises BuildError."""
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and shutil.which(name.split()[0]):
            return name
    raise BuildError("no C++ compiler: set CXX, or install g++ or clang")


def units(count: int) -> list[list[Path]]:
    """The files of csrc in `count` groups of about one size, or fewer. Raises BuildError."""
    groups: list[list[Path]] = [[] for _ in range(count)]
    sizes = [0] * count
    for file in sorted(sources().glob("*.cpp"), key=lambda file: (-file.stat().st_size, file.name)):
        smallest = sizes.index(min(sizes))
        groups[smallest].append(file)
        sizes[smallest] += file.stat().st_size
    return [group for group in groups if group]


def compile_command(out: Path, flags: Sequence[str] = ()) -> list[str]:
    """The compiler's command line for a unit, which it reads from standard input. flags: further ones, after the usual.

    Raises BuildError.
    """
    import torch

    root = Path(torch.__file__).parent
    includes = [root / "include", root / "include" / "torch" / "csrc" / "api" / "include", sources()]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    return [
        *compiler().split(),
        *FLAGS,
        *flags,
        abi,
        *(f"-I{path}" for path in includes),
        "-c",
        "-xc++",
        "-",
        "-o",
        str(out),
    ]


def link_command(out: Path, objects: Sequence[Path], flags: Sequence[str] = ()) -> list[str]:
    """The command line that makes the library of compiled units."""
    import torch

    # torch brings the OpenMP library that it runs on; a second one would fight with it for the cores
    libraries = [f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    return [*compiler().split(), *FLAGS, *flags, "-shared", *map(str, objects), "-o", str(out), *libraries]


def build(out: Path, flags: Sequence[str] = ()) -> None:
    """Compile to `out`, which is replaced in one step. Raises BuildError with the compiler's last words."""
    groups = units(min(MOST, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1))
    unfinished = out.with_name(f"{out.name}.{os.getpid()}")
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(len(groups)) as pool:
        objects = [Path(folder) / f"{i}.o" for i in range(len(groups))]
        texts = ["".join(f'#include "{file.name}"\n' for file in group) for group in groups]
        list(pool.map(lambda target, text: _run(compile_command(target, flags), text), objects, texts))
        try:
            _run(link_command(unfinished, objects, flags))
            unfinished.replace(out)
        finally:
            unfinished.unlink(missing_ok=True)


def _run(command: list[str], text: str = "") -> None:
    done = subprocess.run(command, input=text, capture_output=True, text=True)
    if done.returncode:
        raise BuildError(f"{compiler()} failed with code {done.returncode}:\n{done.stderr[-4000:]}")


def main() -> int:
    out = Path(__file__).resolve().parent / NAME
    try:
        build(out)
    except BuildError as error:
        print(f"pixelgen_kernels: {error}", file=sys.stderr)
        return 1
    print(f"built {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
