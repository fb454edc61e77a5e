"""Compile the CPU bodies in csrc into one shared library, with whatever C++ compiler there is.

setup.py runs this on installation; `pixelgen kernels build` runs it again, after another PyTorch was installed or a
compiler. The library has no Python in it: torch.ops.load_library opens it and its operators register themselves.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

NAME = "_native.so"
MATHS = ("-fno-math-errno", "-fno-trapping-math")  # what vectorisation needs and NaN survives
FLAGS = ("-std=c++20", "-O3", "-fopenmp", *MATHS, "-fPIC", "-shared", "-fvisibility=hidden")


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


def command(out: Path, flags: Sequence[str] = ()) -> list[str]:
    """The compiler's command line. flags: further ones, after the usual. Raises BuildError."""
    import torch

    root = Path(torch.__file__).parent
    # torch brings the OpenMP library that it runs on; a second one would fight with it for the cores
    libraries = [f"-L{root / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    includes = [f"-I{root / 'include'}", f"-I{root / 'include' / 'torch' / 'csrc' / 'api' / 'include'}"]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    source = str(sources() / "native.cpp")
    return [*compiler().split(), *FLAGS, *flags, abi, *includes, source, "-o", str(out), *libraries]


def build(out: Path, flags: Sequence[str] = ()) -> None:
    """Compile to `out`, which is replaced in one step. Raises BuildError with the compiler's last words."""
    unfinished = out.with_name(f"{out.name}.{os.getpid()}")
    done = subprocess.run(command(unfinished, flags), capture_output=True, text=True)
    if done.returncode:
        unfinished.unlink(missing_ok=True)
        raise BuildError(f"{compiler()} failed with code {done.returncode}:\n{done.stderr[-4000:]}")
    unfinished.replace(out)


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
