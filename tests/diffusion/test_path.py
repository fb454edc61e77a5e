"""The linear path and the conversions between velocity, data and noise."""

import itertools

import pytest
import torch

from pixelgen_fast.diffusion import path

B, SHAPE = 6, (3, 4, 5)
PAIRS = list(itertools.product("vxe", repeat=2))


def draw(seed: int = 0):
    """x, e [B, 3, 4, 5] and t [B] inside (0.1, 0.9), float64."""
    g = torch.Generator().manual_seed(seed)
    x, e = (torch.randn(B, *SHAPE, generator=g, dtype=torch.float64) for _ in "xe")
    return x, e, 0.1 + 0.8 * torch.rand(B, generator=g, dtype=torch.float64)


@pytest.mark.parametrize("s", [1.0, 2.5])
def test_path_ends_at_noise_and_data_and_moves_at_the_velocity(s):
    """z(0) = s e, z(1) = x, and a difference quotient of z in t is x - s e."""
    x, e, t = draw()
    torch.testing.assert_close(path.add_noise(x, e, torch.zeros(B), s), s * e)
    torch.testing.assert_close(path.add_noise(x, e, torch.ones(B), s), x)
    quotient = (path.add_noise(x, e, t + 1e-3, s) - path.add_noise(x, e, t - 1e-3, s)) / 2e-3
    torch.testing.assert_close(quotient, path.truth("v", x, e, s), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("s", [1.0, 2.5])
@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_truth_converts_into_truth(source, target, s):
    x, e, t = draw()
    z = torch.stack([t[b] * x[b] + (1 - t[b]) * s * e[b] for b in range(B)])
    truth = {"x": x, "e": e, "v": x - s * e}
    out = path.convert(truth[source], z, t, source, target, s)
    torch.testing.assert_close(out, truth[target], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_any_prediction_converts_there_and_back(source, target):
    """Also a wrong prediction: the conversions are inverse maps, not only right at the truth."""
    x, e, t = draw()
    prediction, z = x.flip(0) * 1.7, path.add_noise(x, e, t)
    there = path.convert(prediction, z, t, source, target)
    torch.testing.assert_close(path.convert(there, z, t, target, source), prediction, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_slope_is_the_derivative_of_convert(source, target):
    """By autograd, on both sides of the divisors' floor."""
    x, e, _ = draw()
    t = torch.tensor([0.0, 0.03, 0.2, 0.6, 0.97, 1.0], dtype=torch.float64)
    p = x.clone().requires_grad_()
    path.convert(p, path.add_noise(x, e, t, 1.5), t, source, target, 1.5, t_eps=0.05).sum().backward()
    expected = path.slope(t, source, target, 1.5, t_eps=0.05)
    torch.testing.assert_close(p.grad, expected[:, None, None, None].expand_as(x), rtol=1e-12, atol=1e-12)


def test_divisors_stop_at_the_floor():
    """JiT's velocity of an x-prediction, (net - z) / max(1 - t, 0.05), and the mirror image for e at t near 0."""
    x, e, _ = draw()
    t = torch.tensor([0.0, 0.01, 0.5, 0.9, 0.99, 1.0], dtype=torch.float64)
    z = path.add_noise(x, e, t)
    from_x, from_e = (path.convert(x.flip(0), z, t, source, "v") for source in "xe")
    for b in range(B):
        torch.testing.assert_close(from_x[b], (x.flip(0)[b] - z[b]) / max(1 - float(t[b]), 0.05))
        torch.testing.assert_close(from_e[b], (z[b] - x.flip(0)[b]) / max(float(t[b]), 0.05))


def test_optimal_predictions_of_a_gaussian_give_one_velocity():
    """Data N(mu, sigma^2): given z, x and e are jointly Gaussian with var z = q = t^2 sigma^2 + (1-t)^2, hence

    E[x|z] = mu + t sigma^2 (z - t mu) / q,    E[e|z] = (1-t) (z - t mu) / q,    E[v|z] = E[x|z] - E[e|z].
    """
    _, z, t = draw()
    mu, sigma, w = 0.7, 0.3, t[:, None, None, None]
    q = w**2 * sigma**2 + (1 - w) ** 2
    x, e = mu + w * sigma**2 * (z - w * mu) / q, (1 - w) * (z - w * mu) / q
    for source, prediction in {"x": x, "e": e, "v": x - e}.items():
        torch.testing.assert_close(path.convert(prediction, z, t, source, "v"), x - e, rtol=1e-12, atol=1e-12)


def test_half_precision_is_computed_in_float32():
    """A bfloat16 prediction is widened before any arithmetic; time broadcasts over any trailing shape."""
    x, e, t = (v.to(torch.bfloat16) for v in draw())
    z = path.add_noise(x, e, t)
    out = path.convert(x, z, t, "x", "v")
    assert z.dtype == out.dtype == torch.float32
    exact = path.convert(x.double(), z.double(), t.double(), "x", "v")
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)
    assert path.add_noise(torch.ones(B), torch.zeros(B), t).shape == (B,)


def test_bad_arguments_are_named():
    x, e, t = draw()
    with pytest.raises(ValueError, match=r"one number per image, \[6\], got \[1\]"):
        path.add_noise(x, e, t[:1])
    with pytest.raises(ValueError, match="must have one shape"):
        path.add_noise(x, e[:2], t)
    with pytest.raises(ValueError, match="must have one shape"):
        path.convert(x, e[:, :1], t, "v", "x")
    for source, target in (("eps", "v"), ("v", "score")):
        with pytest.raises(ValueError, match="is not a prediction; use 'v'"):
            path.convert(x, e, t, source, target)
