"""Which body runs and why, what the inputs of an operator must be, and the shared sum of partial results."""

import pytest
import torch
from pixelgen_kernels import library
from torch.utils.flop_counter import FlopCounterMode

CPU, META = torch.zeros(1), torch.zeros(1, device="meta")


def test_body_follows_the_device(monkeypatch):
    monkeypatch.delenv(library.VARIABLE)
    monkeypatch.setattr(library, "native_problem", lambda: "csrc is not compiled")
    monkeypatch.setattr(library, "has_native", lambda: False)
    assert library.body(CPU) == library.body(META) == "reference"
    assert library.describe_bodies("cpu") == "operators: reference (csrc is not compiled)"
    assert library.choose_body("cuda") == ("triton", "CUDA device")
    monkeypatch.setattr(library, "has_native", lambda: True)
    assert library.body(CPU) == "native"
    assert library.body(META) == library.body(CPU.double()) == "reference"
    assert library.describe_bodies("cpu") == "operators: native (CPU, csrc compiled)"


@pytest.mark.parametrize("name", ["reference", "native", "triton"])
def test_body_can_be_forced(name, monkeypatch):
    monkeypatch.setattr(library, "has_native", lambda: True)
    monkeypatch.setattr(library, "INTERPRETED", True)
    monkeypatch.setenv(library.VARIABLE, name)
    assert library.body(CPU) == name
    assert library.describe_bodies("cpu") == f"operators: {name} (PIXELGEN_OPS={name})"


@pytest.mark.parametrize(
    ("forced", "device", "message"),
    [
        ("cuda", "cpu", "'cuda' names no body; use one of reference, native, triton, or unset it"),
        ("native", "cuda", "native runs on CPU tensors only"),
        ("native", "cpu", "native cannot run: no compiler; or unset PIXELGEN_OPS"),
        ("triton", "cpu", "triton on a CPU tensor needs TRITON_INTERPRET=1 .* or unset PIXELGEN_OPS"),
    ],
)
def test_a_body_that_cannot_run_is_refused(forced, device, message, monkeypatch):
    monkeypatch.setattr(library, "native_problem", lambda: "no compiler")
    monkeypatch.setattr(library, "has_native", lambda: False)
    monkeypatch.setattr(library, "INTERPRETED", False)
    monkeypatch.setenv(library.VARIABLE, forced)
    with pytest.raises(ValueError, match=f"PIXELGEN_OPS={message}" if forced != "cuda" else message):
        library.choose_body(device)


def test_operator_registers_shapes_and_flops():
    def fake(x: torch.Tensor, n: int) -> torch.Tensor:
        return x.new_empty(x.shape[0], n)

    @library.operator("test_product", fake, lambda x, n, *, out_shape: 2 * x[0] * x[1] * n)
    def product(x: torch.Tensor, n: int) -> torch.Tensor:
        return x @ x.new_ones(x.shape[1], n)

    assert torch.equal(library.kernels.test_product(torch.ones(3, 5), 7), torch.full((3, 7), 5.0))
    with FlopCounterMode(display=False) as counter:
        assert library.kernels.test_product(torch.ones(3, 5, device="meta"), 7).shape == (3, 7)
    assert counter.get_total_flops() == 2 * 3 * 5 * 7


def test_check_accepts_what_kernels_take(monkeypatch):
    monkeypatch.setattr(library, "INTERPRETED", True)
    packed = torch.zeros(2, 12)
    library.check("op", packed, rows=("shift",), x=(packed, (2, 12)), shift=(packed[:, 4:8], (2, 4)))
    monkeypatch.setenv(library.VARIABLE, "reference")
    library.check("op", packed.double(), x=(packed.double(), (2, 12)))


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
def test_check_names_what_does_not_fit(tensor, shape, message, monkeypatch):
    monkeypatch.setattr(library, "INTERPRETED", True)
    with pytest.raises(ValueError, match=message):
        library.check("op", CPU, x=(tensor, shape))


@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (255, 3), (257, 17), (600, 2, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_sum_partials(shape, dtype, device, assert_close):
    torch.manual_seed(0)
    partials = torch.randn(shape, device=device)
    total = library.sum_partials(partials, dtype)
    assert total.dtype == dtype
    assert_close("sum", total, partials.double().sum(0), 1e-6 if dtype == torch.float32 else 1e-3)


def test_sum_partials_past_two_to_the_31(addresses):
    """2^11 partial results of 2^21 + 5 numbers: the last element is number 4294977535."""
    rows, columns = 2**11, 2**21 + 5
    touched = addresses(
        library.sum_partials_kernel, (columns // 16, 0, 0), partial_ptr=torch.float32, out_ptr=torch.float32,
        R=rows, C=columns, BLOCK_R=256, BLOCK_C=16,
    )  # fmt: skip
    assert touched["partial_ptr"].tolist() == [r * columns + columns - 5 + c for r in range(rows) for c in range(5)]
    assert touched["out_ptr"].tolist() == list(range(columns - 5, columns))
