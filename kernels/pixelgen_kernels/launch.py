"""A kernel launch, written once: a run starts it, the report compiles it, the warm-up warms it, a benchmark names it.

    plan      a cached function of sizes, types, tuning configuration and multiprocessors: the launches of an operator
    launcher  allocates the results and starts the launches of its plan on tensors:  launch.start(*arguments)

While somebody is recording, a launch is written down with the types of its arguments instead of started. Tensors may
then be on "meta", so that the launches of any model are listed without a GPU and without memory:

    with recording() as started:
        operator(*meta_tensors)

What was recorded has the key that Triton makes of a launch: kernel, types and alignments of its arguments, constants,
warps, stages and options.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

POINTERS = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.float64: "*fp64",
    torch.bool: "*u1", torch.int8: "*i8", torch.uint8: "*u8", torch.int32: "*i32", torch.int64: "*i64",
}  # fmt: skip
ALIGNMENT = 16  # bytes of a pointer, and divisor of an integer, that Triton compiles for


@dataclass(frozen=True)
class Launch:
    """One kernel launch, apart from the tensors and numbers that it is started with.

    name: unique among the launches of its operator; contains "_fwd" or "_bwd".
    kernel: the triton.jit function; its arguments are pointers and numbers, then constants.
    grid: number of programs. constants: value of every constexpr argument.
    flops: 2 x multiply-adds of its matrix products, 0 where it has none.
    bytes_moved: what it must read from and write to HBM, each tensor once.
    rows: pixels or tokens it handles, the unit of "issue slots per row".
    loops: trip count of its loops by nesting depth, outermost first; a kernel without a loop has ().
    widest: bits of the widest access that the layout in memory allows to nine tenths of its bytes, which the report's
        gate asks for; below 128 only where rows begin at addresses that are no multiple of 16 bytes (a target of
        three float32 a pixel).
    options: further options of the Triton backend, such as {"maxnreg": 128}.
    """

    name: str
    kernel: Any
    grid: int
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    bytes_moved: int
    rows: int
    flops: int = 0
    loops: tuple[int, ...] = ()
    widest: int = 128
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def direction(self) -> Literal["forward", "backward"]:
        return "backward" if "_bwd" in self.name else "forward"

    @functools.cached_property
    def keywords(self) -> dict[str, Any]:
        """What Triton is given beside the arguments: constants, warps, stages and options."""
        return {**self.constants, "num_warps": self.num_warps, "num_stages": self.num_stages, **self.options}

    def start(self, *arguments: Tensor | int | float | bool | None) -> None:
        """Start the kernel on its pointers and numbers, in the kernel's order; or write it down for who records."""
        if self.grid == 0:
            return
        if _recorder is not None:
            _recorder.started.append(Started.of(self, arguments))
        else:
            self.kernel[(self.grid,)](*arguments, **self.keywords)


@dataclass(frozen=True)
class Started:
    """A launch with the types of the arguments that it was started with.

    signature: Triton type of every argument that is no constant: "*bf16", "*fp32", "i32", "i64", "fp32", ...
    constants: those of the launch, and the arguments that Triton makes constants of: None, and integers that are 1.
    aligned: pointers and integers that are multiples of 16. Arguments in the kernel's do_not_specialize are in neither.
    """

    launch: Launch
    signature: dict[str, str]
    constants: dict[str, Any]
    aligned: frozenset[str]

    @classmethod
    def of(cls, launch: Launch, arguments: tuple[Any, ...]) -> Started:
        names = [name for name in launch.kernel.arg_names if name not in launch.constants]
        general = _not_specialised(launch.kernel)
        signature, constants, aligned = {}, dict(launch.constants), []
        for name, value in zip(names, arguments, strict=True):
            if value is None or (type(value) is int and value == 1 and name not in general):
                constants[name] = value
                continue
            signature[name] = _type(value)
            if name not in general and _aligned(value):
                aligned.append(name)
        return cls(launch, signature, constants, frozenset(aligned))

    @property
    def key(self) -> tuple[Any, ...]:
        """Everything that decides which compiled kernel runs; equal for launches that share one."""
        launch = self.launch
        return (
            launch.kernel.fn.__name__, tuple(sorted(self.signature.items())), tuple(sorted(self.aligned)),
            tuple(sorted((name, str(value)) for name, value in self.constants.items())), launch.num_warps,
            launch.num_stages, tuple(sorted(launch.options.items())),
        )  # fmt: skip


def _not_specialised(kernel: Any) -> tuple[str, ...]:
    """The arguments whose values Triton does not look at: triton.jit's do_not_specialize, of a kernel or its twin in
    the interpreter."""
    return tuple(
        getattr(kernel, "do_not_specialize", None) or getattr(kernel, "kwargs", {}).get("do_not_specialize") or ()
    )


def _type(value: Tensor | int | float | bool) -> str:
    if isinstance(value, Tensor):
        return POINTERS[value.dtype]
    if isinstance(value, bool):
        return "u1"
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def _aligned(value: Tensor | int | float | bool) -> bool:
    if isinstance(value, Tensor):
        address = value.storage_offset() * value.element_size() if value.is_meta else value.data_ptr()
        return address % ALIGNMENT == 0
    return type(value) is int and value % ALIGNMENT == 0


@dataclass
class _Recorder:
    multiprocessors: int
    started: list[Started]


_recorder: _Recorder | None = None


@contextmanager
def recording(multiprocessors: int = 132) -> Iterator[list[Started]]:
    """Write down instead of start, in the order of starting. multiprocessors: of the GPU that is planned for."""
    global _recorder
    before, _recorder = _recorder, _Recorder(multiprocessors, [])
    try:
        yield _recorder.started
    finally:
        _recorder = before


def is_recording() -> bool:
    return _recorder is not None


def multiprocessors(device: torch.device) -> int:
    """How many programs of a persistent kernel run side by side: the GPU's multiprocessors, 2 in the interpreter."""
    if _recorder is not None:
        return _recorder.multiprocessors
    return _of_gpu(device.index) if device.type == "cuda" else 2


@functools.cache
def _of_gpu(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count
