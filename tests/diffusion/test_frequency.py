"""The frequency loss against SciPy's DCT, Pillow's JPEG tables, Parseval's theorem and finite differences."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.fft import dctn

from pixelgen_fast.diffusion import frequency
from pixelgen_fast.diffusion.frequency import block_dct, frequency_loss, frequency_weights, quantisation_table


def velocities(height: int = 16, width: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    """Two float64 velocities [2, 3, height, width]."""
    generator = torch.Generator().manual_seed(5)
    return tuple(torch.randn(2, 3, height, width, generator=generator, dtype=torch.float64) for _ in range(2))


def jpeg_tables(quality: int) -> list[list[int]]:
    """Luminance and chrominance table of a file that Pillow saved: row by row since 8.3, before in zig-zag order."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (200, 30, 90)).save(file, "JPEG", quality=quality)
    tables = Image.open(file).quantization
    return [list(tables[i]) for i in sorted(tables)]


def test_blocks_are_those_of_scipy() -> None:
    x, _ = velocities()
    found = block_dct(x)
    assert found.shape == (2, 3, 8, 8, 2, 3)
    for b, c, h, w in np.ndindex(2, 3, 2, 3):
        block = x[b, c, 8 * h : 8 * h + 8, 8 * w : 8 * w + 8].numpy()
        np.testing.assert_allclose(found[b, c, :, :, h, w], dctn(block, norm="ortho"), rtol=0, atol=1e-13)


@pytest.mark.parametrize("quality", [1, 10, 33, 50, 75, 85, 95, 100])
def test_tables_are_those_that_jpeg_files_hold(quality: int) -> None:
    luminance, chrominance = jpeg_tables(quality)
    assert quantisation_table(frequency.LUMINANCE, quality).flatten().tolist() == luminance
    assert quantisation_table(frequency.CHROMINANCE, quality).flatten().tolist() == chrominance


def test_the_colour_matrix_is_that_of_jpeg() -> None:
    """Pillow's conversion without its offsets, to the rounding of a byte."""
    pixels = np.random.RandomState(0).randint(0, 256, (8, 8, 3), dtype=np.uint8)
    converted = np.asarray(Image.fromarray(pixels, "RGB").convert("YCbCr")).astype(float) - [0, 128, 128]
    np.testing.assert_allclose(pixels @ np.array(frequency.YCBCR).T, converted, rtol=0, atol=1)


def test_weights_favour_what_jpeg_keeps_and_are_1_on_average() -> None:
    weights = frequency_weights(85)
    assert weights.shape == (3, 8, 8) and torch.equal(weights[1], weights[2])
    assert weights.mean(dim=(1, 2)).tolist() == pytest.approx([1, 1, 1], abs=1e-12)
    # at quality 85 the luminance entries 16 and 99 become 5 and 30
    assert (weights[0, 0, 0] / weights[0, 7, 7]).item() == pytest.approx(30 / 5, rel=1e-12)
    assert torch.allclose(frequency_weights(100), torch.ones(3, 8, 8, dtype=torch.float64))


def test_the_loss_written_out() -> None:
    """Block by block with SciPy, in float64."""
    predicted, true = velocities()
    d = np.einsum("yc,bchw->byhw", np.array(frequency.YCBCR), (predicted - true).numpy())
    tables = np.array(jpeg_tables(85))[[0, 1, 1]].reshape(3, 8, 8)
    w = np.stack([(q.mean() / q) / (q.mean() / q).mean() for q in tables])
    expected = np.zeros(2)
    for b, c, h, k in np.ndindex(2, 3, 2, 3):
        block = dctn(d[b, c, 8 * h : 8 * h + 8, 8 * k : 8 * k + 8], norm="ortho")
        expected[b] += (w[c] * block**2).sum() / (3 * 16 * 24)
    np.testing.assert_allclose(frequency_loss(predicted, true, 85), expected, rtol=1e-12)
    in_float32 = frequency_loss(predicted.float(), true.float(), 85)
    assert in_float32.dtype == torch.float32
    np.testing.assert_allclose(in_float32, expected, rtol=1e-5)
    in_bfloat16 = frequency_loss(predicted.bfloat16(), true.bfloat16(), 85)
    assert in_bfloat16.dtype == torch.float32
    np.testing.assert_allclose(in_bfloat16, expected, rtol=2**-7)


def test_parseval() -> None:
    """At quality 100 all weights are 1, and an orthonormal transform keeps squares."""
    predicted, true = velocities()
    ycbcr = torch.tensor(frequency.YCBCR, dtype=torch.float64)
    d = torch.einsum("yc,bchw->byhw", ycbcr, predicted - true)
    torch.testing.assert_close(frequency_loss(predicted, true, 100), d.square().mean(dim=(1, 2, 3)), rtol=1e-12, atol=0)


def test_gradient_is_that_of_finite_differences() -> None:
    predicted, true = (v[:1, :, :8, :8].contiguous().requires_grad_() for v in velocities())
    assert torch.autograd.gradcheck(lambda p, q: frequency_loss(p, q, 85), (predicted, true))


@pytest.mark.parametrize(
    ("shapes", "quality", "message"),
    [
        (((1, 3, 12, 16), (1, 3, 12, 16)), 85, "12 x 16 pixels do not divide into blocks of 8 x 8"),
        (((1, 3, 8, 8), (2, 3, 8, 8)), 85, r"got \[1, 3, 8, 8\] and \[2, 3, 8, 8\]"),
        (((1, 1, 8, 8), (1, 1, 8, 8)), 85, r"two velocities \[B, 3, H, W\]"),
        (((1, 3, 8, 8), (1, 3, 8, 8)), 0, "quality must be from 1 to 100, got 0"),
    ],
)
def test_what_cannot_work_is_refused(shapes: tuple, quality: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        frequency_loss(*(torch.zeros(shape) for shape in shapes), quality)
