"""A launch that is written down has the key that Triton makes of one that is started."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from pixelgen_kernels.launch import Launch, Started, is_recording, multiprocessors, recording
from pixelgen_kernels.registry import OPERATORS
from pixelgen_kernels.shapes import RAGGED, XL
from pixelgen_kernels.swiglu import CONFIGS, plan, swiglu
from support.operator_runs import CASES, inputs, run
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

H100 = make_backend(GPUTarget("cuda", 90, 32))


@triton.jit
def copy_kernel(x_ptr, y_ptr, n, eps, flag, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + o, tl.load(x_ptr + o, mask=o < n), mask=o < n)


@triton.jit(do_not_specialize=["n"])
def any_size_kernel(x_ptr, n, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x_ptr + o, 0.0, mask=o < n)


def launch_of(kernel: Any = copy_kernel, grid: int = 1, **options: Any) -> Launch:
    return Launch("copy_fwd", kernel, grid, {"BLOCK": 16}, num_warps=4, num_stages=1, bytes_moved=0, rows=1, **options)


@functools.cache
def binder(kernel: Any) -> tuple[list[str], Any]:
    """Triton's own reading of a call, which it does before every start on a GPU."""
    if not isinstance(kernel, JITFunction):
        kernel = JITFunction(kernel.fn, do_not_specialize=kernel.kwargs.get("do_not_specialize"))
    return kernel.arg_names, create_function_from_signature(kernel.signature, kernel.params, H100)


def by_triton(launch: Launch, arguments: tuple[Any, ...]) -> Started:
    names, bind = binder(launch.kernel)
    found = dict(zip(names, bind(*arguments, **launch.keywords)[1], strict=True))
    return Started(
        launch,
        signature={name: kind for name, (kind, _) in found.items() if kind != "constexpr"},
        constants={name: value for name, (kind, value) in found.items() if kind == "constexpr"},
        aligned=frozenset(name for name, (kind, how) in found.items() if kind != "constexpr" and "D" in (how or "")),
    )


def test_numbers_and_pointers(device):
    x = torch.zeros(64, dtype=torch.bfloat16, device=device)
    started = Started.of(launch_of(), (x, x[1:], 48, 1.0, True))
    assert started.signature == {"x_ptr": "*bf16", "y_ptr": "*bf16", "n": "i32", "eps": "fp32", "flag": "u1"}
    assert started.constants == {"BLOCK": 16}
    assert started.aligned == {"x_ptr", "n"}


def test_one_and_nothing_are_constants(device):
    x = torch.zeros(16, device=device)
    started = Started.of(launch_of(), (x, None, 1, 1.0, False))
    assert started.constants == {"BLOCK": 16, "y_ptr": None, "n": 1}
    assert started.signature == {"x_ptr": "*fp32", "eps": "fp32", "flag": "u1"} and started.aligned == {"x_ptr"}


def test_a_number_that_is_not_looked_at_is_neither_constant_nor_aligned(device):
    x = torch.zeros(16, device=device)
    keys = {Started.of(launch_of(any_size_kernel), (x, n)).key for n in (1, 16, 17)}
    assert len(keys) == 1
    assert Started.of(launch_of(any_size_kernel), (x, 1)).signature == {"x_ptr": "*fp32", "n": "i32"}


@pytest.mark.parametrize(
    ("value", "kind", "aligned"),
    [(0, "i32", True), (-1, "i32", False), (2**31 - 1, "i32", False), (2**31, "i64", True), (-(2**31), "i32", True),
     (-(2**31) - 1, "i64", False), (2**40 + 1, "i64", False)],
)  # fmt: skip
def test_integers_are_as_wide_as_they_must_be(value, kind, aligned, device):
    x = torch.zeros(16, device=device)
    started = Started.of(launch_of(), (x, x, value, 0.5, True))
    assert started.signature["n"] == kind and ("n" in started.aligned) == aligned
    assert started.key == by_triton(launch_of(), (x, x, value, 0.5, True)).key


@pytest.mark.parametrize("offset", [0, 1, 4, 7, 8, 16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64, torch.uint8, torch.bool, torch.int64])
def test_a_view_is_aligned_by_its_offset(dtype, offset, device):
    """On meta as in memory, where an allocation begins at a multiple of 16 bytes."""
    x = torch.zeros(64, dtype=dtype, device=device)
    arguments = (x, x[offset:], 5, 0.5, True)
    started = Started.of(launch_of(), arguments)
    assert ("y_ptr" in started.aligned) == (offset * dtype.itemsize % 16 == 0)
    meta = torch.zeros(64, dtype=dtype, device="meta")
    assert started.key == Started.of(launch_of(), (meta, meta[offset:], 5, 0.5, True)).key
    assert started.key == by_triton(launch_of(), arguments).key


@pytest.mark.parametrize("shape", ["one", "odd", "long"])
@pytest.mark.parametrize("case", CASES)
def test_what_is_listed_without_memory_is_what_triton_is_given(case, shape, device, monkeypatch):
    """Every launch of an operator on tensors in memory: its key by Triton itself, and from the list on meta."""
    started = []
    monkeypatch.setattr(Launch, "start", lambda self, *args: self.grid and started.append((self, args)))
    with recording():
        run(case, inputs(case, RAGGED[shape], device))
    keys = [by_triton(launch, args).key for launch, args in started]
    assert keys == [Started.of(launch, args).key for launch, args in started]
    monkeypatch.undo()
    listed = CASES[case].launches(RAGGED[shape], case, dtype=torch.float32)
    assert keys == [one.key for one in listed]
    assert bool(keys) == (CASES[case].name != "attention")


def test_a_key_in_full():
    (forward, _) = OPERATORS["swiglu"].launches(XL, config=CONFIGS[0])
    assert forward.key == (
        "swiglu_fwd_kernel",
        (("N", "i32"), ("packed_ptr", "*bf16"), ("y_ptr", "*bf16")),
        ("N", "packed_ptr", "y_ptr"),
        (("BLOCK_F", "1024"), ("BLOCK_N", "2"), ("F", "3072")),
        4,
        1,
        (),
    )


def test_everything_that_makes_another_kernel_makes_another_key(device):
    x, y = torch.zeros(64, device=device), torch.zeros(64, device=device)
    launches = [
        (launch_of(), (x, y, 48, 0.5, True)),
        (launch_of(), (x[1:], y, 48, 0.5, True)),
        (launch_of(), (x, y, 47, 0.5, True)),
        (launch_of(), (x, y, 2**40, 0.5, True)),
        (launch_of(), (x, None, 48, 0.5, True)),
        (launch_of(), (x, y.half(), 48, 0.5, True)),
        (launch_of(options={"maxnreg": 128}), (x, y, 48, 0.5, True)),
    ]
    assert len({Started.of(launch, arguments).key for launch, arguments in launches}) == len(launches)
    same = [launch_of(grid=7), launch_of()]
    assert len({Started.of(launch, (x, y, n, e, True)).key for launch in same for n, e in ((48, 0.5), (80, 1.0))}) == 1


def test_an_argument_too_many_or_too_few_is_refused(device):
    x = torch.zeros(16, device=device)
    for arguments in ((x, x, 16, 0.5), (x, x, 16, 0.5, True, 3)):
        with pytest.raises(ValueError, match="zip"), recording():
            launch_of().start(*arguments)


def test_recording_nests_and_ends(device):
    packed = torch.randn(3, 8, device=device)
    with recording() as outer:
        swiglu(packed)
        with recording(multiprocessors=7) as inner:
            assert multiprocessors(packed.device) == 7
            swiglu(packed)
            swiglu(packed)
        assert multiprocessors(packed.device) == 132 and is_recording()
        swiglu(packed)
    assert [len(outer), len(inner)] == [2, 2] and not is_recording()
    with pytest.raises(RuntimeError), recording():
        raise RuntimeError
    assert not is_recording()
    assert torch.isfinite(swiglu(packed)).all(), "outside, launches are started again"


def test_a_grid_of_nothing_starts_nothing(device, monkeypatch):
    with recording() as started:
        launch_of(grid=0).start("anything")
        assert not swiglu(torch.zeros(0, 8, device=device)).numel()
    assert started == []
    launch_of(kernel=None, grid=0).start("anything")


def test_a_started_kernel_writes(device):
    x = torch.ones(16, device=device)
    launch_of(any_size_kernel).start(x, 10)
    assert x.tolist() == [0.0] * 10 + [1.0] * 6


def test_a_plan_is_made_once():
    arguments = ("fwd", 7, 24, 2, CONFIGS[0])
    assert plan(*arguments) is plan(*arguments) is not plan("bwd", *arguments[1:])
    assert plan(*arguments).keywords is plan(*arguments).keywords
    assert plan(*arguments).keywords == {"F": 24, "BLOCK_N": 2, "BLOCK_F": 1024, "num_warps": 4, "num_stages": 1}
    assert [plan(kind, *arguments[1:]).direction for kind in ("fwd", "bwd")] == ["forward", "backward"]
