"""Which pieces are hidden: against another implementation of the schedule, and the laws of order and share."""

import math

import pytest
import torch
from scipy import stats

from pixelgen_fast.models import masking

NUMBERS = torch.arange(4000)


@pytest.mark.parametrize(("length", "passes"), [(256, 64), (256, 256), (16, 64), (16, 16), (16, 3), (1, 5), (7, 1)])
def test_every_pass_tells_a_piece_and_the_last_all_that_are_left(length: int, passes: int) -> None:
    counts = masking.hidden_counts(length, passes)
    assert len(counts) == min(length, passes) and counts[-1] == 0
    assert all(before > after for before, after in zip([length, *counts], counts, strict=False))


def test_the_schedule_is_a_cosine() -> None:
    """Worked by hand for 8 pieces in 4 passes: 8 cos(22.5), 8 cos(45), 8 cos(67.5) degrees are 7.39, 5.66, 3.06."""
    assert masking.hidden_counts(8, 4) == [7, 5, 3, 0]
    # where the cosine is flat, one piece less with every pass: the closed form of that is a running minimum
    floors = [256, *(math.floor(256 * math.sin(math.pi / 2 * (64 - s) / 64) + 1e-9) for s in range(1, 64))]
    wanted = [min(floors[k] - (s - k) for k in range(s + 1)) for s in range(1, 64)]
    assert masking.hidden_counts(256, 64) == [*wanted, 0]


def test_the_share_is_a_truncated_normal() -> None:
    u = torch.linspace(0.001, 0.999, 500, dtype=torch.float64)
    for low in (0.7, 0.0):
        wanted = stats.truncnorm((low - 1) / 0.25, 0, loc=1, scale=0.25).ppf(u.numpy())
        torch.testing.assert_close(masking.hidden_share(u, low), torch.from_numpy(wanted), rtol=1e-9, atol=1e-9)


def test_orders_are_permutations_and_any_is_as_likely() -> None:
    ranks = masking.random_ranks(3, NUMBERS, 4)
    assert torch.equal(ranks.sort(dim=1).values, torch.arange(4).expand(4000, 4))
    _, counts = ranks.unique(dim=0, return_counts=True)
    assert len(counts) == 24 and stats.chisquare(counts.numpy()).pvalue > 1e-4
    assert torch.equal(masking.random_ranks(3, NUMBERS[7:9], 4), ranks[7:9])


def test_training_hides_what_the_share_says() -> None:
    hidden = masking.training_mask(3, NUMBERS, 16, 0.7)
    counts = hidden.sum(dim=1)
    assert counts.min() == 16 - masking.most_known(16, 0.7) == 12 and counts.max() == 16
    law = stats.truncnorm(-1.2, 0, loc=1, scale=0.25)
    expected = [law.cdf(k / 16) - law.cdf((k - 1) / 16) for k in range(12, 17)]
    assert stats.chisquare(counts.bincount(minlength=17)[12:].numpy(), 4000 * torch.tensor(expected)).pvalue > 1e-4
    # every piece is hidden as often as any other
    assert stats.chisquare(hidden.sum(dim=0).numpy()).pvalue > 1e-4
