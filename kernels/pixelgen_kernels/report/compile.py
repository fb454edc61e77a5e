"""Compile a launch for a GPU that is not there, and remember the answer.

    Started + architecture -> Triton -> cubin -> cuobjdump (registers, stack) and nvdisasm (instructions) -> Compiled

An answer is stored under the hash of everything it depends on: the kernel's source with all that it calls, the launch's
key, architecture, Triton's version and this analysis itself.
Compilation runs in processes of its own, because a compile holds the interpreter's lock.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from pixelgen_kernels.launch import Started
from pixelgen_kernels.report import sass

ARCHITECTURES = {80: "A100", 90: "H100", 100: "B200"}


class ToolError(RuntimeError):
    """A tool of the CUDA toolkit is missing or failed."""


@dataclass(frozen=True)
class Compiled:
    """Resources of one compiled kernel: registers per thread, stack bytes per thread, shared bytes per block.

    profile: its instructions, None for architectures other than 90, whose instruction set `sass` reads.
    error: the compiler's message where there is no kernel, and all else is 0 then.
    """

    registers: int = 0
    stack: int = 0
    shared: int = 0
    profile: sass.Profile | None = None
    error: str = ""


def compile_all(
    launches: Sequence[Started], arch: int = 90, jobs: int = 2, done: Callable[[Started, float], None] | None = None
) -> list[Compiled]:
    """Compile launches for `arch` (80, 90 or 100), in their order, taking from the store what it has.

    jobs: processes; 0 compiles in this one. done(launch, seconds) is called after each compile.
    Raises ValueError for another architecture or under TRITON_INTERPRET, ToolError without the CUDA tools.
    """
    if arch not in ARCHITECTURES:
        raise ValueError(f"architecture {arch} is not one of {sorted(ARCHITECTURES)}")
    for started in launches:
        if not isinstance(started.launch.kernel, JITFunction):
            raise ValueError(
                f"{started.launch.name}: {type(started.launch.kernel).__name__} cannot be compiled ahead of time; "
                "the report needs triton.jit functions and a process without TRITON_INTERPRET=1"
            )
    for name in ("cuobjdump", "nvdisasm"):
        tool(name)
    keys = [key(started, arch) for started in launches]
    answers = {k: _load(k) for k in keys if _path(k).exists()}
    missing = {k: started for k, started in zip(keys, launches, strict=True) if k not in answers}
    for k, answer, seconds in _compile_here(missing, arch) if jobs == 0 else _compile_apart(missing, arch, jobs):
        answers[k] = answer
        if not answer.error:
            _store(k, answer)
        if done:
            done(missing[k], seconds)
    return [answers[k] for k in keys]


def compile_one(started: Started, arch: int) -> Compiled:
    """Compile in this process, past the store. A kernel that the compiler refuses gives Compiled(error=...)."""
    launch, kernel = started.launch, started.launch.kernel
    signature = {n: "constexpr" if n in started.constants else started.signature[n] for n in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(kernel.arg_names) if n in started.aligned}
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages, **launch.options}
    source = ASTSource(kernel, signature, started.constants, aligned)
    try:
        binary = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    except Exception as error:  # any stage of the compiler may raise its own type; the report shows it and goes on
        return Compiled(error=f"{type(error).__name__}: {error}")
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(binary.asm["cubin"])
        usage = run_tool("cuobjdump", "--dump-resource-usage", str(cubin))
        listing = run_tool("nvdisasm", "-c", str(cubin)) if arch == 90 else None
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if not found:
        raise ToolError(f"cuobjdump gave no resource usage for {launch.name}: {usage[:500]}")
    profile = sass.profile(listing, launch.loops) if listing else None
    return Compiled(int(found[1]), int(found[2]), binary.metadata.shared, profile)


def key(started: Started, arch: int) -> str:
    """Hash of all that the compiled kernel and its analysis depend on."""
    launch = started.launch
    parts = [triton.__version__, arch, launch.kernel.cache_key, started.key, launch.loops, _analysis()]
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def store() -> Path:
    """Folder of the stored answers: kernels/ in the cache of this software."""
    if named := os.environ.get("PIXELGEN_CACHE"):
        return Path(named).expanduser() / "kernels"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pixelgen_fast" / "kernels"


def tool(name: str) -> str:
    """Path of a CUDA tool: the one beside Triton's compiler. Raises ToolError when it is not there."""
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    if not path.exists():
        raise ToolError(f"{name} is not at {path}; the triton wheel for Linux ships it: pip install --force triton")
    return str(path)


def run_tool(name: str, *arguments: str) -> str:
    """Output of a CUDA tool. Raises ToolError with its message when it fails."""
    result = subprocess.run([tool(name), *arguments], capture_output=True, text=True)
    if result.returncode:
        raise ToolError(f"{name} {' '.join(arguments)} failed with {result.returncode}: {result.stderr.strip()}")
    return result.stdout


def _analysis() -> str:
    folder = Path(__file__).parent
    return hashlib.sha256((folder / "compile.py").read_bytes() + (folder / "sass.py").read_bytes()).hexdigest()


def _path(k: str) -> Path:
    return store() / f"{k}.json"


def _store(k: str, compiled: Compiled) -> None:
    store().mkdir(parents=True, exist_ok=True)
    part = _path(k).with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps(asdict(compiled)))
    part.replace(_path(k))


def _load(k: str) -> Compiled:
    fields = json.loads(_path(k).read_text())
    profile = fields.pop("profile")
    if profile is not None:
        profile["access"] = {int(width): n for width, n in profile["access"].items()}
        profile = sass.Profile(**profile)
    return Compiled(profile=profile, **fields)


def _portable(started: Started) -> Started:
    """The launch with its kernel named instead of held: a triton.jit function does not pickle."""
    function = started.launch.kernel.fn
    return replace(started, launch=replace(started.launch, kernel=(function.__module__, function.__qualname__)))


def _compile_here(missing: dict[str, Started], arch: int) -> Iterator[tuple[str, Compiled, float]]:
    for k, started in missing.items():
        start = perf_counter()
        yield k, compile_one(started, arch), perf_counter() - start


def _compile_apart(missing: dict[str, Started], arch: int, jobs: int) -> Iterator[tuple[str, Compiled, float]]:
    """Compile in processes, in the order in which they finish."""
    if not missing:
        return
    with ProcessPoolExecutor(min(jobs, len(missing)), mp_context=multiprocessing.get_context("spawn")) as pool:
        running = {pool.submit(_compile_named, _portable(started), arch): k for k, started in missing.items()}
        for future in as_completed(running):
            yield running[future], *future.result()


def _compile_named(started: Started, arch: int) -> tuple[Compiled, float]:
    """Compile a launch whose kernel is named; the answer and the seconds it took."""
    module, name = started.launch.kernel
    kernel = getattr(importlib.import_module(module), name)
    start = perf_counter()
    return compile_one(replace(started, launch=replace(started.launch, kernel=kernel)), arch), perf_counter() - start
