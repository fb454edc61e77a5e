"""The sum of partial results, in a fixed order."""

import pytest
import torch
from pixelgen_kernels.sum_partials import plan_sum, sum_partials, sum_partials_kernel


@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (255, 3), (257, 17), (600, 2, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_sums(shape, dtype, device, assert_close):
    generator = torch.Generator().manual_seed(0)
    partials = torch.randn(shape, generator=generator).to(device)
    launch = plan_sum("reduce", shape[0], partials[:1].numel() or partials.shape[1], rows=1)
    total = sum_partials(launch, partials, dtype)
    assert total.dtype == dtype and total.shape == partials.shape[1:]
    assert_close("sum_partials", "sum", total, partials.double().sum(0))


def test_offsets_past_two_to_the_31(addresses):
    """2^11 partial results of 2^21 + 5 numbers: the last element is number 4294977535."""
    rows, columns = 2**11, 2**21 + 5
    touched = addresses(
        sum_partials_kernel, (columns // 16, 0, 0), partial_ptr=torch.float32, out_ptr=torch.float32,
        R=rows, C=columns, BLOCK_R=256, BLOCK_C=16,
    )  # fmt: skip
    assert touched["partial_ptr"].tolist() == [r * columns + columns - 5 + c for r in range(rows) for c in range(5)]
    assert touched["out_ptr"].tolist() == list(range(columns - 5, columns))
