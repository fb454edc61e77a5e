"""The crop on decoded pixels against PIL's, the definition."""

import numpy as np
import pytest
import torch
from PIL import Image

from pixelgen_fast.data.crop import centre_crop
from pixelgen_fast.data.fast_crop import Cropper, _even, _filtered, centre_crop_into

SIZE = 64
# height x width: enlarged, shrunk, of the size already; then halved once to four times with even sides on the way
EVEN = [
    (40, 50),
    (75, 100),
    (127, 127),
    (64, 64),
    (64, 90),
    (130, 200),
    (128, 128),
    (256, 300),
    (512, 648),
    (1104, 1280),
]
ODD = [(129, 161), (131, 200), (301, 420), (703, 901)]  # an odd side is halved once or more


def differences(pixels: np.ndarray) -> np.ndarray:
    out = np.empty((SIZE, SIZE, 3), np.uint8)
    centre_crop_into(pixels, out)
    return np.abs(out.astype(int) - np.asarray(centre_crop(Image.fromarray(pixels), SIZE), dtype=int))


@pytest.mark.parametrize("kind", ["photo", "noise"])
@pytest.mark.parametrize("shape", EVEN, ids=str)
def test_a_crop_is_pils_to_a_level_here_and_there(make_photo, shape, kind):
    noise = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    error = differences(make_photo(*shape) if kind == "photo" else noise)
    # measured: at most 2 levels, and in 1.1 % of the values any
    assert error.max() <= 2 and (error > 0).mean() <= 0.03


@pytest.mark.parametrize("shape", ODD, ids=str)
def test_of_odd_sides_only_the_middle_differs(make_photo, shape):
    error = differences(make_photo(*shape))
    apart = np.abs(np.arange(SIZE) + 0.5 - SIZE / 2) > 5
    assert error[apart][:, apart].max() <= 2 and error.mean() <= 0.5


@pytest.mark.parametrize("shape", [(200, 300), (402, 202), (256, 256)])
def test_even_sides_are_halved_as_by_pil_to_the_bit(shape):
    pixels = np.random.default_rng(1).integers(0, 256, (*shape, 3), dtype=np.uint8)
    half = (shape[0] // 2, shape[1] // 2)
    expected = np.asarray(Image.fromarray(pixels).resize(half[::-1], Image.Resampling.BOX))
    if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
        assert np.array_equal(_filtered(pixels, half, mode="bilinear"), expected)


def test_of_three_pixels_in_the_middle_the_last_is_left_out():
    pixels = np.arange(7 * 5 * 3, dtype=np.uint8).reshape(7, 5, 3)
    # halves of 3 and 2 results: PIL averages pixels 2, 3, 4 of seven and 0, 1, 2 of five
    assert np.array_equal(_even(pixels), pixels[[0, 1, 2, 3, 5, 6]][:, [0, 1, 3, 4]])


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_crop_every_image_of_a_batch(make_photo, threads):
    images = [make_photo(70 + 7 * k, 90, k) for k in range(10)]
    cropper = Cropper(SIZE, threads, pinned=False)
    for batch in (images, images[:2], images[::-1]):
        out = cropper.start(batch)
        cropper.finish()
        assert out.dtype == torch.uint8 and out.shape == (len(batch), SIZE, SIZE, 3)
        for image, crop in zip(batch, out.numpy(), strict=True):
            alone = np.empty((SIZE, SIZE, 3), np.uint8)
            centre_crop_into(image, alone)
            assert np.array_equal(crop, alone)
    cropper.start([np.zeros((8, 8, 3), np.float64)])
    with pytest.raises(TypeError, match="float64"):
        cropper.finish()
    cropper.close()
