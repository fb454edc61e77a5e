"""The measure of agreement: what is not finite is found first, and a table says what is tolerated."""

import math

import pytest
import torch
from pixelgen_kernels.agreement import TOLERANCES, relative_error, tolerance, worst
from pixelgen_kernels.registry import OPERATORS

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("out", "ref", "error"),
    [
        ([3.0, 4.0], [3.0, 4.0], 0.0),
        ([3.0, 4.5], [3.0, 4.0], 0.1),
        ([0.3, 0.4], [0.0, 0.0], 0.5),
        ([], [], 0.0),
        ([NAN, 1.0], [1.0, 1.0], INF),
        ([1.0, 1.0], [NAN, 1.0], INF),
        ([INF, 1.0], [1.0, 1.0], INF),
        ([1.0, 1.0], [INF, 1.0], INF),
        ([INF, 1.0], [-INF, 1.0], INF),
        ([NAN, 1.0], [INF, 1.0], INF),
        ([NAN, 1.0], [NAN, 1.0], 0.0),
        ([INF, 3.0, 4.5], [INF, 3.0, 4.0], 0.1),
        ([1e300, 1.0], [2e300, 1.0], INF),
    ],
    ids=str,
)
def test_relative_error(out, ref, error):
    out, ref = (torch.tensor(x, dtype=torch.float64) for x in (out, ref))
    assert relative_error(out, ref) == pytest.approx(error, rel=1e-12)


def test_the_error_is_measured_in_float64():
    """A difference that float32 and bfloat16 would not keep; and whole numbers past 2^24."""
    ref = torch.tensor([1.0, 1.0], dtype=torch.float64)
    assert relative_error(torch.ones(2), ref + 1e-12) == pytest.approx(1e-12, rel=1e-3)
    assert relative_error(torch.ones(2).bfloat16(), ref * (1 + 1e-6)) == pytest.approx(1e-6, rel=1e-3)
    assert relative_error(torch.tensor([2**32 - 1]), torch.tensor([2**32 - 2])) > tolerance("words", torch.int64) == 0.0


def test_a_gradient_is_compared_by_its_values():
    leaf = torch.ones(3, requires_grad=True)
    assert relative_error(2 * leaf, torch.full((3,), 2.0)) == 0.0


def test_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"cannot compare \[2\] with \[2, 1\]"):
        relative_error(torch.zeros(2), torch.zeros(2, 1))


def test_worst_is_the_largest_and_refuses_a_nan():
    assert worst([]) == 0.0
    assert worst([1e-7, 3e-7, 2e-7]) == 3e-7
    assert worst([1e-7, INF]) == INF
    for errors in ([NAN], [1.0, NAN], [NAN, 1.0]):
        with pytest.raises(ValueError, match="an error is NaN"):
            worst(errors)


def test_the_table_names_operators_and_gives_reasons():
    assert {name for name, _ in TOLERANCES} <= {"", *OPERATORS}
    assert all(entry.error > 0 and len(entry.reason) > 20 for entry in TOLERANCES.values())
    for name in OPERATORS:
        single, half, brain = (tolerance(name, dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16))
        assert 0 < single < half < brain


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn])
def test_other_types_have_no_tolerance(dtype):
    with pytest.raises(KeyError):
        tolerance("swiglu", dtype)
