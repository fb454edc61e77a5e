"""The ADM crop against its own arithmetic: block means, exact sizes, and the published rounding."""

import numpy as np
import pytest
from einops import reduce
from PIL import Image

from pixelgen_fast.data.crop import centre_crop, crop_plan


def test_sizes_by_hand():
    # 500 x 333: no halving at 256; 333 * 256 / 333 = 256, 500 * 256 / 333 = 384.38
    assert crop_plan(500, 333, 256) == ([], (384, 256), (64, 0))
    # 1101 -> 550 -> 275, 1533 -> 766 -> 383; 383 * 256 / 275 = 356.5
    assert crop_plan(1101, 1533, 256) == ([(550, 766), (275, 383)], (256, 357), (0, 50))
    # 511 is below 2 x 256 and is not halved; 512 is
    assert crop_plan(511, 600, 256).halved == []
    assert crop_plan(512, 600, 256) == ([(256, 300)], (256, 300), (0, 22))
    assert crop_plan(8, 8, 16) == ([], (16, 16), (0, 0))


@pytest.mark.parametrize("height, width, size", [(0, 5, 8), (5, -1, 8), (5, 5, 0)])
def test_nonsense_sizes_are_refused(height, width, size):
    with pytest.raises(ValueError, match="positive"):
        crop_plan(height, width, size)


def test_power_of_two_reduction_is_the_block_mean(make_photo):
    image = make_photo(64, 96)
    got = np.asarray(centre_crop(Image.fromarray(image), 16), dtype=np.float64)
    means = reduce(image.astype(np.float64), "(h a) (w b) c -> h w c", "mean", a=4, b=4)[:, 4:20]
    # Two halvings, each rounding up half a level at most twice.
    assert np.abs(got - means).max() <= 2.0
    assert 0.0 < (got - means).mean() < 1.1


def test_images_of_the_right_size_pass_unchanged(make_photo):
    image = make_photo(40, 40)
    assert np.array_equal(np.asarray(centre_crop(Image.fromarray(image), 40)), image)
