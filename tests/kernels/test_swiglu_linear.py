"""swiglu_linear against float64, what it keeps, and what it refuses."""

import pytest
import torch
import torch.nn.functional as F
from pixelgen_kernels.swiglu_linear import swiglu_linear


def definition(packed: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    a, b = packed.chunk(2, dim=-1)
    return (F.silu(a) * b) @ weight.t()


@pytest.mark.parametrize(("rows", "hidden", "width"), [((1,), 1, 1), ((2, 3), 24, 8), ((5, 7), 33, 10)])
def test_output_and_gradients(body, gradients, assert_close, rows, hidden, width) -> None:
    inputs = {"packed": torch.randn(*rows, 2 * hidden), "weight": torch.randn(width, hidden)}
    cotangent = torch.randn(*rows, width)
    (out,), found = gradients(swiglu_linear, inputs, [cotangent])
    (wanted,), expected = gradients(definition, inputs, [cotangent], dtype=torch.float64)
    assert_close("out", out, wanted)
    assert found.keys() == expected.keys()
    for name in found:
        assert_close(name, found[name], expected[name])


def test_only_the_inputs_are_kept() -> None:
    packed, weight = torch.randn(4, 48, requires_grad=True), torch.randn(8, 24, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        swiglu_linear(packed, weight)
    assert {t.data_ptr() for t in kept} == {packed.data_ptr(), weight.data_ptr()}


def test_shapes_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match=r"packed \[4, 48\].*weight \[8, 23\]"):
        swiglu_linear(torch.zeros(4, 48), torch.zeros(8, 23))
