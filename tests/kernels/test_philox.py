"""Philox4x32-10 against Random123's published vectors and a Python-integer twin, and what the engine asks of it."""

import numpy as np
import pytest
import torch
from pixelgen_kernels import bodies, philox
from scipy import stats

SEED = 0x0123456789ABCDEF
MASK = 0xFFFFFFFF

# Random123, tests/kat_vectors, "philox4x32 10": counter, key, result.
KNOWN = {
    "zeros": ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    "ones": ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    "pi": ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
}


@pytest.fixture(autouse=True)
def reference_body(triton_bodies: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The laws of the numbers are proved on one body; the others (fixture `body`) draw the same words."""
    monkeypatch.setenv(bodies.VARIABLE, "reference")


def hexes(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def philox_of_integers(counter: list[int], key: list[int]) -> list[int]:
    """Ten rounds as printed in Salmon et al. 2011, section 3.3, on Python integers."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b & MASK, (a >> 32) ^ c3 ^ k1, a & MASK
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return [c0, c1, c2, c3]


@pytest.mark.parametrize("name", KNOWN)
def test_known_answers_of_random123(name):
    counter, key, answer = map(hexes, KNOWN[name])
    assert philox_of_integers(counter, key) == answer
    words = philox.philox4x32(tuple(key), *(torch.tensor([c]) for c in counter))
    assert [int(word) for word in words] == answer


@pytest.mark.parametrize("count", [1, 4, 11])
def test_words_are_counted_by_element_image_and_stream(count, body, device):
    """Word i of image n is word i % 4 of the block (i // 4, n low, n high, stream), also past 2^32 images."""
    numbers = [0, 1, 2**32 - 1, 2**32, 5 * 2**40 + 17]
    words = philox.words(SEED, torch.tensor(numbers, device=device), philox.FLIP, count)
    expected = [
        [
            philox_of_integers([i // 4, n & MASK, n >> 32, philox.FLIP], [SEED & MASK, SEED >> 32])[i % 4]
            for i in range(count)
        ]
        for n in numbers
    ]
    assert words.dtype == torch.int64
    assert words.tolist() == expected


def test_the_whole_seed_counts(body, device):
    """Both halves of a 64-bit seed reach the key, and a negative seed is its two's complement."""
    numbers = torch.arange(3, device=device)
    draws = [philox.words(seed, numbers, philox.NOISE, 8) for seed in (1, 1 + 2**32, 2, -1)]
    assert all(not torch.equal(a, b) for i, a in enumerate(draws) for b in draws[:i])
    assert torch.equal(draws[3], philox.words(2**64 - 1, numbers, philox.NOISE, 8))


@pytest.mark.parametrize("draw", [philox.words, philox.uniform, philox.normal])
def test_an_image_draws_the_same_whatever_its_batch(draw, body, device):
    """Any slice, order or length of the draw gives the same bits: what makes world size and micro-batch irrelevant."""
    numbers = torch.arange(100, 116, device=device)
    whole = draw(SEED, numbers, philox.NOISE, 30)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(draw(SEED, numbers[order], philox.NOISE, 30), whole[order])
    assert torch.equal(torch.cat([draw(SEED, n, philox.NOISE, 30) for n in numbers.split(7)]), whole)
    assert torch.equal(draw(SEED, numbers, philox.NOISE, 13), whole[:, :13])


def test_uniform_reads_the_top_bits_of_a_word():
    """u = (floor(word / 2^9) + 1/2) / 2^23, exact in float32, so never 0 and never 1."""
    words = philox.words(SEED, torch.arange(50), philox.TIME, 20).numpy()
    expected = (np.floor(words / 512.0) + 0.5) / 2.0**23
    u = philox.uniform(SEED, torch.arange(50), philox.TIME, 20)
    assert u.dtype == torch.float32
    assert np.array_equal(u.numpy().astype(np.float64), expected)
    assert 0 < 0.5 * 2.0**-23 <= u.min() and u.max() <= 1 - 0.5 * 2.0**-23 < 1


def test_normal_is_box_muller_of_neighbouring_uniforms():
    """Numbers 2i and 2i+1 are sqrt(-2 ln u_2i) (cos, sin)(2 pi u_2i+1), taken in float64 from the same uniforms."""
    u = philox.uniform(SEED, torch.arange(40), philox.NOISE, 26).double().numpy()
    radius, angle = np.sqrt(-2 * np.log(u[:, 0::2])), 2 * np.pi * u[:, 1::2]
    expected = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1).reshape(40, 26)
    n = philox.normal(SEED, torch.arange(40), philox.NOISE, 25)
    assert n.dtype == torch.float32 and n.shape == (40, 25)
    np.testing.assert_allclose(n.numpy(), expected[:, :25], atol=5e-6)


@pytest.mark.parametrize("first", [0, 2**32 - 300, 2**52])
@pytest.mark.parametrize(("draw", "law"), [(philox.uniform, "uniform"), (philox.normal, "norm")])
def test_draws_follow_their_law(draw, law, first):
    """Kolmogorov-Smirnov over 600 images of 500 numbers, within an image and across images, at the 0.1 % level."""
    values = draw(SEED, torch.arange(first, first + 600), philox.NOISE, 500).numpy()
    assert stats.kstest(values.ravel(), law).pvalue > 1e-3
    assert stats.kstest(values[0], law).pvalue > 1e-3
    assert stats.kstest(values[:, 0], law).pvalue > 1e-3


def test_moments_of_normal():
    """Mean, variance, skewness and kurtosis of 4e5 numbers within four standard errors of 0, 1, 0, 3."""
    values = philox.normal(SEED, torch.arange(400), philox.NOISE, 1000).double().numpy().ravel()
    root_n = np.sqrt(values.size)
    assert abs(values.mean()) < 4 / root_n
    assert abs(values.var() - 1) < 4 * np.sqrt(2) / root_n
    assert abs((values**3).mean()) < 4 * np.sqrt(15) / root_n
    assert abs((values**4).mean() - 3) < 4 * np.sqrt(96) / root_n


def test_neighbours_are_uncorrelated():
    """Next image, next element, next stream, next seed: correlation within four standard errors of zero."""
    numbers = torch.arange(300)
    a = philox.normal(SEED, numbers, philox.NOISE, 400)
    neighbours = {
        "image": philox.normal(SEED, numbers + 1, philox.NOISE, 400),
        "element": torch.roll(a, 1, dims=1),
        "pair": torch.roll(a, 2, dims=1),
        "stream": philox.normal(SEED, numbers, philox.TIME, 400),
        "sampling stream": philox.normal(SEED, numbers, philox.SAMPLING, 400),
        "seed": philox.normal(SEED + 1, numbers, philox.NOISE, 400),
        "image 2^32 on": philox.normal(SEED, numbers + 2**32, philox.NOISE, 400),
    }
    for name, b in neighbours.items():
        for moment in (1, 2):
            r = np.corrcoef((a**moment).ravel(), (b**moment).ravel())[0, 1]
            assert abs(r) < 4 / np.sqrt(a.numel()), f"{name}, power {moment}: correlation {r:.4f}"


def test_bits_are_fair():
    """Each of the 32 bit positions is set in half of 4e5 words, within five standard errors."""
    words = philox.words(SEED, torch.arange(400), philox.NOISE, 1000).numpy().ravel()
    share = [np.mean((words >> bit) & 1) for bit in range(32)]
    assert max(abs(s - 0.5) for s in share) < 5 * 0.5 / np.sqrt(words.size)


@pytest.mark.parametrize("numbers", [torch.arange(4, dtype=torch.int32), torch.arange(4)[:, None], torch.ones(4)])
def test_numbers_of_another_kind_are_refused(numbers):
    with pytest.raises(ValueError, match=r"numbers must be int64 \[B\]"):
        philox.words(SEED, numbers, philox.NOISE, 4)
