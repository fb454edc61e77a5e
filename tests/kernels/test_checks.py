"""What the inputs of an operator must be, and how what does not fit is named."""

import pytest
import torch
from pixelgen_kernels import bodies
from pixelgen_kernels.checks import check

CPU = torch.zeros(1)


@pytest.fixture(autouse=True)
def kernels_run(monkeypatch):
    """A machine with a GPU checks CPU tensors too."""
    monkeypatch.setattr(bodies, "INTERPRETED", True)


def test_what_kernels_take_is_accepted(monkeypatch):
    packed = torch.zeros(2, 12)
    check("op", packed, rows=("shift",), x=(packed, (2, 12)), shift=(packed[:, 4:8], (2, 4)))
    check("op", packed, rows=("gate",), gate=(packed[:, ::2][:, :1], (2, 1)))
    monkeypatch.setenv(bodies.VARIABLE, "reference")
    check("op", packed.double(), x=(packed.double(), (2, 12)))


@pytest.mark.parametrize(
    ("tensor", "shape", "message"),
    [
        (torch.zeros(2, 3), (3, 2), r"op: x must be \[3, 2\], got \[2, 3\]"),
        (torch.zeros(2, 3).int(), (2, 3), r"op: x must be float32, bfloat16 or float16, got torch\.int32$"),
        (torch.zeros(2, 3).double(), (2, 3), "got torch.float64; only PIXELGEN_OPS=reference takes float64"),
        (torch.zeros(2, 3, device="meta"), (2, 3), "op: x must be on cpu, got meta"),
        (torch.zeros(3, 2).t(), (2, 3), r"op: x must be contiguous, got \[2, 3\] with strides \(1, 2\); call"),
    ],
)
def test_what_does_not_fit_is_named(tensor, shape, message, monkeypatch):
    monkeypatch.setattr(bodies, "has_native", lambda: True)
    monkeypatch.setenv(bodies.VARIABLE, "native")  # any but the reference
    with pytest.raises(ValueError, match=message):
        check("op", CPU, x=(tensor, shape))


def test_rows_need_unit_stride():
    with pytest.raises(
        ValueError, match=r"op: gate must have unit stride in its last dimension, got strides \(12, 2\)"
    ):
        check("op", CPU, rows=("gate",), gate=(torch.zeros(2, 12)[:, ::2], (2, 6)))
