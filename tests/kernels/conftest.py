"""Kernel tests run the Triton bodies: in Triton's interpreter where there is no GPU, on the GPU where there is one.
A test that asks for the fixture `body` runs three times, on the reference, the compiled CPU body and the kernels.

`gpu` tests run on a GPU only; those that watch the interpreter (fixture `addresses`) run where there is none.
Every buffer that the operators allocate is filled with NaN first, so that an element which no program writes fails.
"""

import os
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch

GPU = torch.cuda.is_available()
if not GPU:
    # triton.jit chooses the interpreter when a kernel is defined: set it before the first import of the package.
    os.environ["TRITON_INTERPRET"] = "1"

from pixelgen_kernels.agreement import relative_error, tolerance  # noqa: E402
from pixelgen_kernels.bodies import INTERPRETED, interpreter_problem  # noqa: E402
from pixelgen_kernels.native import has_native, native_problem  # noqa: E402

if not GPU and not INTERPRETED:
    raise pytest.UsageError(
        "pixelgen_kernels was imported before TRITON_INTERPRET=1 was set; "
        "set it in tests/conftest.py or in the environment"
    )
if not GPU and interpreter_problem():
    raise pytest.UsageError(interpreter_problem())


# torch.device as a context remembers torch's constructors at its first use; it must not remember the poisoned ones.
with torch.device("cpu"):
    torch.empty(0)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    def runs_here(item: pytest.Item) -> bool:
        return "addresses" not in item.fixturenames if GPU else item.get_closest_marker("gpu") is None

    config.hook.pytest_deselected(items=[item for item in items if not runs_here(item)])
    items[:] = [item for item in items if runs_here(item)]


@pytest.fixture
def device() -> str:
    return "cuda" if GPU else "cpu"


def _force(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU kernels are what CUDA tensors get by themselves, and nothing interprets them for CPU tensors."""
    if GPU and name == "triton":
        monkeypatch.delenv("PIXELGEN_OPS", raising=False)
    else:
        monkeypatch.setenv("PIXELGEN_OPS", name)


@pytest.fixture(autouse=True)
def triton_bodies(monkeypatch: pytest.MonkeyPatch) -> None:
    _force("triton", monkeypatch)


BODIES = ["reference", "triton"] if GPU else ["reference", "native", "triton"]


def _choose(name: str, monkeypatch: pytest.MonkeyPatch) -> str:
    if name == "native":
        assert has_native(), native_problem()
    # a graph that was traced before holds another body
    torch.compiler.reset()
    _force(name, monkeypatch)
    return name


@pytest.fixture(params=BODIES)
def body(request: pytest.FixtureRequest, triton_bodies: None, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which body the operators run in this test."""
    return _choose(request.param, monkeypatch)


@pytest.fixture(params=BODIES[1:])
def compiled_body(request: pytest.FixtureRequest, triton_bodies: None, monkeypatch: pytest.MonkeyPatch) -> str:
    """The same without the reference, for what the compiled bodies alone promise."""
    return _choose(request.param, monkeypatch)


@pytest.fixture(autouse=True)
def poisoned_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.empty and its kin return NaN (integers: their largest value) to code of pixelgen_kernels."""

    def poison(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def poisoned(*args: object, **kwargs: object) -> torch.Tensor:
            tensor = allocate(*args, **kwargs)
            if sys._getframe(1).f_globals.get("__name__", "").startswith("pixelgen_kernels"):
                if tensor.is_floating_point():
                    tensor.fill_(float("nan"))
                elif tensor.dtype != torch.bool:
                    tensor.fill_(torch.iinfo(tensor.dtype).max)
            return tensor

        return poisoned

    for owner, names in {torch: ("empty", "empty_like", "empty_strided"), torch.Tensor: ("new_empty",)}.items():
        for name in names:
            monkeypatch.setattr(owner, name, poison(getattr(owner, name)))


@pytest.fixture
def assert_close() -> Callable[..., None]:
    """assert_close(operator, name, out, ref): same shape, and an error that the operator may have in out's type."""

    def compare(operator: str, name: str, out: torch.Tensor, ref: torch.Tensor) -> None:
        assert out is not None, f"{name}: no result"
        assert out.shape == ref.shape, f"{name}: {list(out.shape)}, expected {list(ref.shape)}"
        error, tolerated = relative_error(out, ref), tolerance(operator, out.dtype)
        assert error <= tolerated, f"{name}: relative error {error:.2e} > {tolerated:.0e}"

    return compare


@pytest.fixture
def gradients() -> Callable[..., tuple[list[torch.Tensor], dict[str, torch.Tensor]]]:
    """gradients(function, inputs, cotangents, dtype=None) -> (outputs, gradients by name).

    inputs: name -> tensor, given to the function by name. Floating tensors are leaves, cast to dtype if one is given.
    cotangents: one tensor or None for each output.
    """

    def run(function, inputs, cotangents, dtype=None, **options):
        leaves = {}
        for name, tensor in inputs.items():
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                leaves[name] = tensor.detach().to(dtype or tensor.dtype).requires_grad_()
            else:
                leaves[name] = tensor
        outputs = function(**leaves, **options)
        outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
        pairs = [(o, c.to(o.dtype)) for o, c in zip(outputs, cotangents, strict=True) if c is not None]
        wanted = {k: v for k, v in leaves.items() if isinstance(v, torch.Tensor) and v.requires_grad}
        found = torch.autograd.grad(
            [o for o, _ in pairs], list(wanted.values()), [c for _, c in pairs], allow_unused=True
        )
        return outputs, dict(zip(wanted, found, strict=True))

    return run


class _Pointer:
    """Stands for a tensor too large to allocate: a data type and an address."""

    def __init__(self, dtype: torch.dtype, address: int) -> None:
        self.dtype, self.address = dtype, address

    def data_ptr(self) -> int:
        return self.address


@pytest.fixture
def addresses(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, np.ndarray]]:
    """addresses(kernel, program, **arguments) -> elements that this one program reads or writes, by argument.

    Runs the kernel itself in the interpreter with loads that return 0 and stores that go nowhere, so that index
    arithmetic is proved at any size. arguments: a torch.dtype stands for a pointer to such elements. program: its
    three ids. Values: sorted unique element offsets from the pointer, as int64, of the lanes whose mask is set.
    """
    from triton.runtime import interpreter

    space = 1 << 56

    def run(kernel, program, **arguments):
        builder, touched = interpreter.interpreter_builder, {}
        pointers = [name for name, value in arguments.items() if isinstance(value, torch.dtype)]
        for i, name in enumerate(pointers):
            # bases in the middle of their space: an offset that wrapped to a negative number stays with its pointer
            arguments[name] = _Pointer(arguments[name], (2 * i + 1) * space)

        def record(pointer, mask):
            lanes = np.broadcast_to(mask.data, pointer.data.shape)
            found = np.asarray(pointer.data, dtype=np.int64)[lanes.astype(bool)]
            if found.size:
                index = int((found[0] + space // 2) // (2 * space))
                name = pointers[index]
                item = arguments[name].dtype.itemsize
                offsets = (found - arguments[name].address) // item
                touched[name] = np.union1d(touched.get(name, np.empty(0, np.int64)), offsets)

        def load(pointer, mask, other, *_):
            record(pointer, mask)
            element = pointer.get_element_ty()
            return interpreter.TensorHandle(np.zeros(pointer.data.shape, interpreter._get_np_dtype(element)), element)

        def store(pointer, value, mask, *_):
            record(pointer, mask)

        with monkeypatch.context() as patch:
            patch.setattr(builder, "create_masked_load", load)
            patch.setattr(builder, "create_masked_store", store)
            patch.setattr(builder, "set_grid_idx", lambda *_: setattr(builder, "grid_idx", program))
            patch.setattr(interpreter.GridExecutor, "_init_args_hst", lambda self, args, kwargs: (args, kwargs))
            patch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *_: None)
            kernel[(1, 1, 1)](**arguments)
        return touched

    return run
