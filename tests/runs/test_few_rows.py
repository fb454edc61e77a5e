import pytest
import torch
from torch import nn

from pixelgen_fast.runs.few_rows import ROWS, FewRows


@pytest.mark.parametrize("width", [96, 1152])
def test_a_row_has_the_bits_that_it_has_among_many(width: int) -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(width, 6 * width), torch.randn(64, width)
    with torch.no_grad(), FewRows():
        many = linear(x)
        for n in range(1, ROWS + 1):
            assert torch.equal(linear(x[:n]), many[:n])


@pytest.mark.parametrize("shape", [(5,), (1, 5), (3, 1, 5), (2, 2, 5), (0, 5)])
def test_shapes_are_those_of_a_linear_layer(shape: tuple[int, ...]) -> None:
    linear, x = nn.Linear(5, 7, bias=False), torch.randn(shape)
    with torch.no_grad():
        wanted = x.double() @ linear.weight.double().T
        with FewRows():
            torch.testing.assert_close(linear(x).double(), wanted, rtol=1e-5, atol=1e-6)
