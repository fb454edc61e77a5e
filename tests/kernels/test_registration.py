"""How operators stand in PyTorch: eager calls go past the dispatcher, all others through it, with the same bits."""

import pytest
import torch
from pixelgen_kernels import bodies
from pixelgen_kernels.launch import recording
from pixelgen_kernels.registration import eager, kernels, operator
from pixelgen_kernels.registry import OPERATORS
from pixelgen_kernels.shapes import ModelShape
from pixelgen_kernels.swiglu import swiglu
from support.operator_runs import CASES, inputs, run
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

SMALL = ModelShape("small", width=24, heads=2, ffn=24, depth=1, pixel_depth=1, parameters=200, batch=2, tokens=4,
                   pixels=16, channels=8, pixel_hidden=32, patch=4)  # fmt: skip
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")


def test_operator_registers_shapes_and_flops():
    def fake(x: torch.Tensor, n: int) -> torch.Tensor:
        return x.new_empty(x.shape[0], n)

    @operator("test_product", fake, lambda x, n, *, out_shape: 2 * x[0] * x[1] * n)
    def product(x: torch.Tensor, n: int) -> torch.Tensor:
        return x @ x.new_ones(x.shape[1], n)

    expected = torch.full((3, 7), 5.0)
    assert torch.equal(kernels.test_product(torch.ones(3, 5), 7), expected)
    assert torch.equal(product(torch.ones(3, 5), 7), expected)
    for call in (product, kernels.test_product):
        with FlopCounterMode(display=False) as counter:
            assert call(torch.ones(3, 5, device="meta"), 7).shape == (3, 7)
        assert counter.get_total_flops() == 2 * 3 * 5 * 7


class Seen(TorchDispatchMode):
    """The operators of ours that the dispatcher was called with."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace.startswith("pixelgen"):
            self.names.append(func.name().partition("::")[2])
        return func(*args, **(kwargs or {}))


def run_compiled(case, device):
    def function(**given):
        return CASES[case].function(**given)

    torch.compiler.reset()
    return run(case, inputs(case, SMALL, device), torch.compile(function, fullgraph=True, backend="aot_eager"))


@pytest.mark.parametrize("case", CASES)
def test_eager_registered_and_compiled_calls_give_the_same_bits(compiled_body, case, device):
    once = run(case, inputs(case, SMALL, device))
    with Seen() as seen:
        registered = run(case, inputs(case, SMALL, device))
    if CASES[case].configs:
        # a kernel that starts without the dispatcher in eager calls is the registered operator for who looks on
        assert CASES[case].name in seen.names
    traced = run_compiled(case, device)
    for name, x in once.items():
        assert torch.equal(x, registered[name]) and torch.equal(x, traced[name]), name


@pytest.mark.parametrize("name", [name for name, operator in OPERATORS.items() if not operator.in_place])
def test_the_reference_compiles_to_one_graph(name, device, monkeypatch, assert_close):
    """Its sums may be taken apart otherwise; PyTorch's own fused AdamW is in no graph."""
    monkeypatch.setenv(bodies.VARIABLE, "reference")
    once, traced = run(name, inputs(name, SMALL, device)), run_compiled(name, device)
    for key, x in once.items():
        assert_close(name, key, traced[key], x)


def test_eager_calls_pass_the_dispatcher_by(device, monkeypatch):
    called = []
    monkeypatch.setattr(torch._ops.OpOverload, "__call__", lambda self, *args, **kwargs: called.append(self))
    packed = torch.randn(3, 8, device=device, requires_grad=True)
    swiglu(packed).sum().backward()
    assert packed.grad is not None and called == []


def test_plain_tensors_are_eager(device):
    plain = torch.zeros(2, device=device)
    assert eager(plain) and eager(nn.Parameter(plain)) and eager(plain.requires_grad_())
    with recording():
        assert eager(plain.to("meta")), "a launch is written down by its launcher"


def test_whoever_looks_on_gets_the_registered_operator(device):
    plain = torch.zeros(2, device=device)
    assert not eager(plain.to("meta"))
    with FakeTensorMode() as mode:
        assert not eager(torch.zeros(2, device=device)) and not eager(plain)
    assert not eager(mode.from_tensor(plain))
    with FlopCounterMode(display=False):
        assert not eager(plain)
    with Seen():
        assert not eager(plain)
    assert eager(plain)


def test_transforms_get_the_registered_operator(device):
    seen = []

    def look(x):
        seen.append(eager(x))
        return x.sum()

    rows = torch.zeros(3, 2, device=device)
    torch.func.vmap(look)(rows), torch.func.grad(look)(rows), torch.func.jvp(look, (rows,), (rows,))
    assert seen == [False] * 3
    captured = rows[0].clone()
    torch.func.vmap(lambda x: x + eager(captured))(rows)
    assert torch.equal(torch.func.vmap(lambda x: x + eager(captured))(rows), rows)


def test_compiled_code_gets_the_registered_operator(device):
    x = torch.zeros(2, device=device)
    compiled = torch.compile(lambda x: x + (2.0 if eager(x) else 1.0), backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), torch.ones_like(x))


@pytest.mark.parametrize("registered", [False, True], ids=["eager", "registered"])
@pytest.mark.parametrize("name", ["swiglu", "swiglu_linear", "qk_norm_rope", "norm_modulate"])
def test_a_second_derivative_is_refused(compiled_body, name, registered, device):
    """Never left out without a word, also where another way to the input is differentiable twice."""
    given = inputs(name, SMALL, device)
    x = next(iter(given.values())).requires_grad_()

    def second():
        out = OPERATORS[name].function(**given)
        first = (out if isinstance(out, torch.Tensor) else out[0]).square().sum() + x.pow(3).sum()
        (grad,) = torch.autograd.grad(first, x, create_graph=True)
        torch.autograd.grad(grad.square().sum(), x)

    with pytest.raises(RuntimeError, match="no autograd formula|is not implemented"):
        if registered:
            with Seen():
                second()
        else:
            second()
