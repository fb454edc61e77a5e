"""Training times, label drop and noise as functions of (seed, image number)."""

import numpy as np
import pytest
import torch
from pixelgen_kernels import philox
from scipy import special, stats

from pixelgen_fast.diffusion import time

SEED = 11


def test_shift_keeps_the_ends_and_pushes_to_noise():
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    shifted = time.shift_time(t, 3.0)
    assert shifted[0] == 0 and shifted[-1] == 1
    assert (shifted[1:-1] < t[1:-1]).all() and (shifted.diff() > 0).all()
    assert time.shift_time(0.5, 3.0) == 0.25
    torch.testing.assert_close(time.shift_time(shifted, 1 / 3), t)
    assert torch.equal(time.shift_time(t, 1.0), t) and torch.equal(time.shift_time(t.float(), 1.0), t.float())


@pytest.mark.parametrize(("mean", "std", "shift"), [(0.0, 1.0, 1.0), (-0.8, 0.8, 1.0), (0.0, 1.0, 3.0)])
def test_logit_normal_times_follow_their_law(mean, std, shift):
    """A shift by s only moves logit(t) by -ln s, so logit(t) is N(mean - ln s, std^2): Kolmogorov-Smirnov."""
    t = time.sample_times(SEED, torch.arange(20_000), "logit_normal", mean, std, shift)
    assert t.dtype == torch.float32 and t.min() > 0 and t.max() < 1
    assert stats.kstest(special.logit(t.numpy()), "norm", (mean - np.log(shift), std)).pvalue > 1e-3


@pytest.mark.parametrize(("mean", "std", "least"), [(0.0, 1.0, 0.001), (0.0, 1.0, 0.4), (-0.8, 0.8, 0.3)])
def test_truncated_times_follow_their_law(mean, std, least):
    """logit(t) is a normal, given that t is not below the least time: Kolmogorov-Smirnov; the shift comes after."""
    t = time.sample_times(SEED, torch.arange(20_000), "logit_normal", mean, std, least=least)
    assert t.dtype == torch.float32 and least <= t.min() and t.max() < 1
    law = stats.truncnorm((special.logit(least) - mean) / std, np.inf, mean, std)
    assert stats.kstest(special.logit(t.numpy()), law.cdf).pvalue > 1e-3
    shifted = time.sample_times(SEED, torch.arange(20_000), "logit_normal", mean, std, 3.0, least=least)
    torch.testing.assert_close(shifted, t / (t + 3 * (1 - t)))
    uniform = time.sample_times(SEED, torch.arange(20_000), "uniform", least=least)
    assert stats.kstest(uniform.numpy(), "uniform", (least, 1 - least)).pvalue > 1e-3


def test_uniform_times_follow_their_law():
    t = time.sample_times(SEED, torch.arange(20_000), "uniform")
    assert stats.kstest(t.numpy(), "uniform").pvalue > 1e-3
    unshifted = time.sample_times(SEED, torch.arange(20_000), "uniform", shift=3.0)
    torch.testing.assert_close(unshifted, t / (t + 3 * (1 - t)))


@pytest.mark.parametrize(("probability", "null"), [(0.1, 10), (0.5, 1000)])
def test_labels_are_dropped_at_their_rate(probability, null):
    labels = torch.arange(20_000) % 10
    out = time.drop_labels(SEED, torch.arange(20_000), labels, probability, null)
    dropped = out != labels
    assert (out[dropped] == null).all()
    assert stats.binomtest(int(dropped.sum()), 20_000, probability).pvalue > 1e-3


def test_label_drop_at_its_ends():
    labels = torch.arange(1000) % 10
    assert torch.equal(time.drop_labels(SEED, torch.arange(1000), labels, 0.0, 10), labels)
    assert (time.drop_labels(SEED, torch.arange(1000), labels, 1.0, 10) == 10).all()


def test_time_and_label_drop_are_independent():
    """They come from two streams: dropped and kept images have the same mean time within four standard errors."""
    numbers = torch.arange(20_000)
    t = time.sample_times(SEED, numbers).numpy()
    dropped = time.drop_labels(SEED, numbers, torch.zeros_like(numbers), 0.5, 1).numpy() == 1
    assert abs(stats.ttest_ind(t[dropped], t[~dropped]).statistic) < 4


def test_noise_is_the_stream_in_row_major_order():
    numbers = torch.tensor([3, 2**33 + 1])
    e = time.noise(SEED, numbers, (3, 5, 7))
    assert e.shape == (2, 3, 5, 7) and e.dtype == torch.float32
    flat = philox.normal(SEED, numbers, philox.NOISE, 105)
    for c, i, j in [(0, 0, 0), (1, 4, 2), (2, 4, 6)]:
        assert torch.equal(e[:, c, i, j], flat[:, c * 35 + i * 7 + j])
    assert torch.equal(
        time.noise(SEED, numbers, (3, 5, 7), philox.SAMPLING).flatten(1)[:, :8],
        philox.normal(SEED, numbers, philox.SAMPLING, 8),
    )


def test_every_draw_ignores_the_batch():
    """Ranks and micro-batches split the image numbers in any way and draw the same."""
    numbers, labels = torch.arange(1000, 1064), torch.arange(64) % 10
    parts = list(zip(numbers.split(5), labels.split(5), strict=True))
    assert torch.equal(torch.cat([time.sample_times(SEED, n) for n, _ in parts]), time.sample_times(SEED, numbers))
    assert torch.equal(
        torch.cat([time.noise(SEED, n, (3, 4, 4)) for n, _ in parts]), time.noise(SEED, numbers, (3, 4, 4))
    )
    assert torch.equal(
        torch.cat([time.drop_labels(SEED, n, y, 0.3, 10) for n, y in parts]),
        time.drop_labels(SEED, numbers, labels, 0.3, 10),
    )


def test_several_times_of_an_image_begin_with_the_one_it_has_alone():
    numbers = torch.arange(3000)
    for kind in ("uniform", "logit_normal"):
        several = time.sample_times(SEED, numbers, kind, -0.8, 0.8, 2.0, count=3)
        assert several.shape == (3000, 3) and several.dtype == torch.float32
        assert torch.equal(several[:, 0], time.sample_times(SEED, numbers, kind, -0.8, 0.8, 2.0))
        first, last = several[:, 0].numpy(), several[:, 2].numpy()
        assert stats.ks_2samp(first, last).pvalue > 1e-3 and abs(stats.pearsonr(first, last).statistic) < 0.08


def test_bad_arguments_are_named():
    numbers = torch.arange(4)
    with pytest.raises(ValueError, match="'lognormal' is unknown; use 'logit_normal' or 'uniform'"):
        time.sample_times(SEED, numbers, "lognormal")
    with pytest.raises(ValueError, match=r"standard deviation.* got -1"):
        time.sample_times(SEED, numbers, std=-1.0)
    for shift in (0.0, -2.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"time shift must be a positive number, got {shift}"):
            time.sample_times(SEED, numbers, shift=shift)
    with pytest.raises(ValueError, match=r"least time must be in \[0, 1\), got 1"):
        time.sample_times(SEED, numbers, least=1.0)
    with pytest.raises(ValueError, match=r"standard deviation.* got 0"):
        time.sample_times(SEED, numbers, std=0.0, least=0.1)
    with pytest.raises(ValueError, match=r"probability must be in .* got 1\.5"):
        time.drop_labels(SEED, numbers, numbers, 1.5, 10)
