"""Every body in csrc returns what its fake kernel says: shapes, strides, types, and nothing shared with an input.

A graph is compiled for what the fake kernels say, so a body that returns other strides is read wrongly, or fails. The
calls are those that the public operators make in forward and backward, written down one level below autograd.
"""

import copy
from contextlib import contextmanager

import pytest
import torch
from pixelgen_kernels import build
from pixelgen_kernels.adamw_ema import adamw_ema_foreach, total_norm
from pixelgen_kernels.bodies import forced
from pixelgen_kernels.shapes import RAGGED
from support.operator_runs import CASES, inputs, run
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

NAMESPACES = ("pixelgen", "pixelgen_native")
# of torch.library.opcheck
BOTH = ("test_schema", "test_faketensor")
# csrc brings their gradient; that of qk_norm_rope stands in Python, the others have none
DIFFERENTIABLE = (
    "attention", "flow_loss", "noised_patch_projection", "norm_modulate", "pixel_mlp", "pixel_modulate", "swiglu"
)  # fmt: skip


class Calls(TorchDispatchMode):
    """Writes down what is called of csrc: (operator, arguments as they were before the call)."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace in NAMESPACES:
            # a copy with the same strides, without the graph that the arguments may hang on
            self.found.append((function, tree_map_only(torch.Tensor, lambda x: copy.deepcopy(x.detach()), args)))
        return function(*args, **(kwargs or {}))


@contextmanager
def native_calls():
    with forced("native"), Calls() as calls:
        yield calls.found


def calls_of(case, shape, dtype):
    """What forward and backward of an operator call."""
    given = inputs(case, shape, "cpu", dtype)
    with native_calls() as found:
        run(case, given)
    return found


def layout(outputs):
    return tree_map_only(torch.Tensor, lambda x: (tuple(x.shape), x.stride(), x.dtype, x.device.type), outputs)


def optimizer_calls():
    """What a step over a list of parameters calls, which is no operator of the registry."""
    tensors = [[torch.rand(n) for n in (3, 5)] for _ in range(5)]
    with native_calls() as found:
        total_norm(tensors[0])
        adamw_ema_foreach(
            *tensors[:4], [tensors[4]], lr=1e-3, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1, step=2,
            ema_decays=[0.9],
        )  # fmt: skip
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_outputs_are_those_of_the_fake_kernel(case, dtype):
    for shape in RAGGED.values():
        for function, args in calls_of(case, shape, dtype):
            with FakeTensorMode() as mode:
                expected = layout(function(*tree_map_only(torch.Tensor, mode.from_tensor, args)))
            assert layout(function(*args)) == expected, f"{function}, {shape.name}"


@pytest.mark.parametrize("case", CASES)
def test_only_what_the_schema_says_is_changed_or_shared(case):
    for function, args in calls_of(case, RAGGED["long"], torch.float32):
        torch.library.opcheck(function, args, test_utils=BOTH)


@pytest.mark.parametrize("case", CASES)
def test_traced_gradients_are_those_of_eager(case):
    for function, args in calls_of(case, RAGGED["long"], torch.float32):
        if function.name().split("::")[1] in DIFFERENTIABLE:
            floating = [x for x in args if isinstance(x, torch.Tensor) and x.is_floating_point()]
            for x in floating:
                x.requires_grad_()
        torch.library.opcheck(function, args, test_utils="test_aot_dispatch_static")


def test_what_the_optimizer_calls():
    for function, args in optimizer_calls():
        torch.library.opcheck(function, args, test_utils=BOTH)


def test_every_body_is_among_them():
    called = {function.name() for function, _ in optimizer_calls()}
    for case in CASES:
        called |= {function.name() for function, _ in calls_of(case, RAGGED["long"], torch.float32)}
    registered = {
        name
        for name in torch._C._dispatch_get_all_op_names()
        if name.split("::")[0] in NAMESPACES and torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU")
    }
    assert called == registered


@pytest.mark.parametrize("count", [1, 2, 4, 50])
def test_every_file_is_compiled_once_in_units_of_about_one_size(count):
    groups = build.units(count)
    files = sorted(build.sources().glob("*.cpp"))
    assert sorted(file for group in groups for file in group) == files
    assert len(groups) == min(count, len(files))
    sizes = [sum(file.stat().st_size for file in group) for group in groups]
    assert max(sizes) - min(sizes) <= max(file.stat().st_size for file in files)
