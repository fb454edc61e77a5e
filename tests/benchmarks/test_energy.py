"""What the count of the energy-guided path says of a transform."""

import energy
import torch


def test_transforms_are_counted_by_what_they_move_and_do() -> None:
    images, spectrum = 2 * 3 * 16 * 16 * 4, 2 * 3 * 16 * 9 * 8
    with energy.Transforms() as counted:
        x = torch.fft.rfft2(torch.empty(2, 3, 16, 16, device="meta"))
        assert (counted.bytes, counted.flops) == (images + spectrum, 2.5 * 2 * 3 * 256 * 8)
        torch.fft.irfft2(x * 2, s=(16, 16))
    assert (counted.bytes, counted.flops) == (2 * (images + spectrum), 2 * 2.5 * 2 * 3 * 256 * 8)


def test_no_kernel_is_shorter_than_a_kernel_can_be() -> None:
    assert energy.FLOORED.time(0, 4) == energy.SHORTEST
    assert energy.FLOORED.time(0, energy.FLOORED.memory) == 1.0
