"""Random crops and DiffAug: each by its formula on one image at a time, and functions of the image's number alone."""

from __future__ import annotations

import numpy as np
import torch
from pixelgen_kernels import philox
from support.golden import relative

from pixelgen_fast.decoding.augment import CROP, FOR_DECODER, OF_FAKES, OF_REALS, augment, random_crop

SIDE = 16


def batch(count: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.rand(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    return images, torch.arange(100, 100 + count)


def by_hand(image: np.ndarray, u: np.ndarray) -> np.ndarray:
    """DiffAug of one image [3, S, S] with the numbers u, step by step in float64."""
    moved = np.zeros_like(image)
    dy, dx = (int(v * 5) - 2 for v in u[:2])  # an eighth of 16 pixels, either way
    for y, x in np.ndindex(SIDE, SIDE):
        if 0 <= y + dy < SIDE and 0 <= x + dx < SIDE:
            moved[:, y, x] = image[:, y + dy, x + dx]
    moved = moved + u[2] - 0.5
    grey = moved.mean(axis=0, keepdims=True)
    moved = (moved - grey) * 2 * u[3] + grey
    return (moved - moved.mean()) * (u[4] + 0.5) + moved.mean()


def test_diffaug_is_translation_then_colour() -> None:
    images, numbers = batch(40)
    drawn = philox.uniform(3, numbers, FOR_DECODER, 5).double().numpy()
    expected = np.stack([by_hand(image, u) for image, u in zip(images.double().numpy(), drawn, strict=True)])
    assert relative(augment(images, 3, numbers, FOR_DECODER), torch.from_numpy(expected)) < 1e-6
    assert {int(v * 5) - 2 for v in drawn[:, 0]} == {-2, -1, 0, 1, 2}


def test_what_is_drawn_is_of_seed_number_and_stream() -> None:
    images, numbers = batch()
    whole = augment(images, 3, numbers, OF_FAKES)
    assert torch.allclose(augment(images[3:4], 3, numbers[3:4], OF_FAKES), whole[3:4], atol=1e-6)
    others = [augment(images, 3, numbers, OF_REALS), augment(images, 4, numbers, OF_FAKES)]
    assert not any(torch.allclose(other, whole, atol=1e-2) for other in others)


def test_a_gradient_passes_but_where_pixels_left() -> None:
    images, numbers = batch()
    images.requires_grad_()
    augment(images, 3, numbers, FOR_DECODER).sum().backward()
    assert torch.isfinite(images.grad).all() and (images.grad != 0).float().mean() > 0.6


def test_crops_reach_every_place() -> None:
    """Pixels name their place, so a crop tells where it begins; all nine places of a 3 pixels' room are met."""
    places = torch.arange(SIDE * SIDE, dtype=torch.float32).view(1, 1, SIDE, SIDE).expand(200, 3, -1, -1)
    cropped = random_crop(places, SIDE - 2, 1, torch.arange(200))
    first = cropped[:, 0, 0, 0].long()
    assert cropped.shape == (200, 3, SIDE - 2, SIDE - 2)
    assert {(int(v) // SIDE, int(v) % SIDE) for v in first} == {(y, x) for y in range(3) for x in range(3)}
    steps = torch.arange(SIDE - 2)
    assert torch.equal(cropped[:, 1].long() - first[:, None, None], (steps[:, None] * SIDE + steps).expand(200, -1, -1))
    assert random_crop(places, SIDE, 1, torch.arange(200)) is places
    again = random_crop(places[:1], SIDE - 2, 1, torch.tensor([7]))
    assert torch.equal(again[0], cropped[7])
    assert CROP not in (FOR_DECODER, OF_FAKES, OF_REALS, philox.NOISE, philox.TIME)
