"""swiglu_linear: any leading dimensions, what it keeps, and what it refuses."""

import pytest
import torch
import torch.nn.functional as F
from pixelgen_kernels.swiglu_linear import swiglu_linear


def definition(packed: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    a, b = packed.chunk(2, dim=-1)
    return (F.silu(a) * b) @ weight.t()


@pytest.mark.parametrize(("rows", "hidden", "width"), [((1,), 1, 1), ((2, 3, 2), 24, 8)])
def test_any_leading_dimensions(body, gradients, assert_close, device, rows, hidden, width) -> None:
    shapes = {"packed": (*rows, 2 * hidden), "weight": (width, hidden)}
    inputs = {name: torch.randn(shape, device=device) for name, shape in shapes.items()}
    cotangent = torch.randn(*rows, width, device=device)
    (out,), found = gradients(swiglu_linear, inputs, [cotangent])
    (wanted,), expected = gradients(definition, inputs, [cotangent], dtype=torch.float64)
    assert_close("swiglu_linear", "out", out, wanted)
    assert found.keys() == expected.keys()
    for name in found:
        assert_close("swiglu_linear", name, found[name], expected[name])


def test_only_the_inputs_are_kept(device) -> None:
    packed, weight = (torch.randn(*shape, device=device, requires_grad=True) for shape in ((4, 48), (8, 24)))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        swiglu_linear(packed, weight)
    assert {t.data_ptr() for t in kept} == {packed.data_ptr(), weight.data_ptr()}


def test_shapes_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match=r"packed \[4, 48\].*weight \[8, 23\]"):
        swiglu_linear(torch.zeros(4, 48), torch.zeros(8, 23))
