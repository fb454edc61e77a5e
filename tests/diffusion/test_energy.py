"""The energy-guided path against sums written out in float64, a library's root finder and blur, and differences."""

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from scipy.optimize import brentq

from pixelgen_fast.diffusion.energy import EnergyPath

EXACT = 50  # bisections that leave nothing of float64
PATHS = [EnergyPath(bisections=EXACT), EnergyPath(2.0, (0.1, 0.8), EXACT)]
SHAPES = [(3, 8, 8), (3, 6, 10), (1, 7, 9), (3, 5, 4), (2, 1, 6)]
T = [0.12, 0.3, 0.5, 0.77]


class Slow:
    """The path of one image [C, H, W], by Fourier sums over whole spectra."""

    def __init__(self, x: np.ndarray, sigma0: float, start: float, end: float) -> None:
        frequencies = [np.array([k / n if 2 * k <= n else k / n - 1 for k in range(n)]) for n in x.shape[1:]]
        self.waves = [np.exp(-2j * np.pi * np.outer(np.arange(n), np.arange(n)) / n) for n in x.shape[1:]]
        self.start, self.end, self.size = start, end, x[0].size
        self.exponent = (np.pi * sigma0) ** 2 * (frequencies[0][:, None] ** 2 + frequencies[1] ** 2) / 0.5
        self.spectrum = self.waves[0] @ x @ self.waves[1].T
        self.energy = (np.abs(self.spectrum) ** 2).sum(axis=0)

    def information(self, s: float) -> float:
        return float((self.energy * (np.exp(-s * self.exponent) - np.exp(-self.exponent)) ** 2).sum())

    def s(self, t: float) -> float:
        u = min(max((t - self.start) / (self.end - self.start), 0.0), 1.0)
        share = 6 * u**5 - 15 * u**4 + 10 * u**3
        if share in (0.0, 1.0):
            return 1.0 - share
        return brentq(lambda s: self.information(s) - share * self.information(0), 0, 1, xtol=1e-16, rtol=1e-15)

    def filtered(self, gain: np.ndarray) -> np.ndarray:
        back = [wave.conj() for wave in self.waves]
        return (back[0] @ (gain * self.spectrum) @ back[1].T).real / self.size

    def x(self, t: float) -> np.ndarray:
        return self.filtered(np.exp(-self.s(t) * self.exponent))

    def rate(self, t: float, h: float = 1e-4) -> np.ndarray:
        """dx*/dt by differences of fourth order."""
        return (8 * (self.x(t + h) - self.x(t - h)) - (self.x(t + 2 * h) - self.x(t - 2 * h))) / (12 * h)


def images(shape: tuple[int, int, int], count: int = len(T), seed: int = 0) -> torch.Tensor:
    """Smooth images with some noise, float64 [B, C, H, W]."""
    x = np.random.default_rng(seed).standard_normal((count, *shape))
    return torch.from_numpy(0.4 + gaussian_filter(x, (0, 0, 1, 1), mode="wrap") + 0.05 * x)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_end_and_its_rate_are_those_of_the_slow_sums(path: EnergyPath, shape: tuple[int, int, int]) -> None:
    x = images(shape)
    end = path.endpoint(x, torch.tensor(T, dtype=torch.float64))
    assert end.x.dtype == end.rate.dtype == torch.float64
    for b, t in enumerate(T):
        slow = Slow(x[b].numpy(), path.sigma0, *path.release)
        np.testing.assert_allclose(end.x[b], slow.x(t), rtol=0, atol=1e-12)
        np.testing.assert_allclose(end.rate[b], slow.rate(t), rtol=0, atol=1e-8 * float(end.rate.abs().max()))


@pytest.mark.parametrize("path", PATHS)
def test_the_energy_let_go_is_the_share_of_the_time(path: EnergyPath) -> None:
    """In pixels, by Parseval: |x*(t) - x*(0)|^2 = rho |x - x*(0)|^2."""
    x, t = images((3, 8, 12), 7), torch.linspace(0, 1, 7, dtype=torch.float64)
    blurred, end = (path.endpoint(x, time).x for time in (torch.zeros_like(t), t))
    found = (end - blurred).square().sum(dim=(1, 2, 3)) / (x - blurred).square().sum(dim=(1, 2, 3))
    u = ((t - path.release[0]) / (path.release[1] - path.release[0])).clamp(0, 1)
    torch.testing.assert_close(found, 6 * u**5 - 15 * u**4 + 10 * u**3, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("path", [EnergyPath(), EnergyPath(2.0, (0.1, 0.8))])
def test_it_begins_with_a_gaussian_blur_and_ends_with_the_image(path: EnergyPath) -> None:
    x = images((3, 32, 24), 2)
    first, last = path.endpoint(x, torch.zeros(2)), path.endpoint(x, torch.tensor([path.release[1], 1.0]))
    blurred = gaussian_filter(x.numpy(), (0, 0, path.sigma0, path.sigma0), mode="wrap", truncate=10)
    np.testing.assert_allclose(first.x, blurred, rtol=0, atol=1e-10)
    torch.testing.assert_close(last.x, x, rtol=0, atol=1e-13)
    assert not first.rate.any() and not last.rate.any()


def test_the_mean_of_a_channel_never_changes() -> None:
    x = images((3, 8, 12))
    end = EnergyPath().endpoint(x, torch.tensor(T))
    torch.testing.assert_close(end.x.mean(dim=(2, 3)), x.mean(dim=(2, 3)), rtol=1e-12, atol=0)
    assert end.rate.mean(dim=(2, 3)).abs().max() < 1e-12 * end.rate.abs().max()


@pytest.mark.parametrize("noise_scale", [1.0, 2.5])
def test_the_velocity_is_that_of_the_noised_images(noise_scale: float) -> None:
    """A difference quotient of z in t; and what z itself says of it, up to the floor of the divisor."""
    path, x = PATHS[0], images((3, 8, 8))
    e = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    t, h = torch.tensor([0.12, 0.5, 0.9, 0.97], dtype=torch.float64), 1e-5

    def z(at: torch.Tensor) -> torch.Tensor:
        return path.endpoint(x, at).noised(e, noise_scale)

    end = path.endpoint(x, t)
    velocity = end.velocity(e, noise_scale)
    torch.testing.assert_close((z(t + h) - z(t - h)) / (2 * h), velocity, rtol=1e-6, atol=1e-6)
    read = end.velocity_at(z(t), t_eps=0.05)
    torch.testing.assert_close(read[:3], velocity[:3], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(read[3], (end.x[3] - z(t)[3]) / 0.05 + 0.97 * end.rate[3], rtol=1e-12, atol=1e-12)


def test_float32_is_near_float64_and_half_precision_is_widened() -> None:
    x, t, path = images((3, 16, 16)).float(), torch.tensor(T), EnergyPath()
    found, exact = path.endpoint(x, t), path.endpoint(x.double(), t.double())
    assert found.x.dtype == found.rate.dtype == path.endpoint(x.bfloat16(), t).x.dtype == torch.float32
    torch.testing.assert_close(found.x.double(), exact.x, rtol=0, atol=1e-6)
    torch.testing.assert_close(found.rate.double(), exact.rate, rtol=0, atol=1e-5 * float(exact.rate.abs().max()))


@pytest.mark.parametrize("shape", [(3, 1, 1), (3, 1, 5), (3, 2, 2), (3, 16, 16)])
@pytest.mark.parametrize("value", [0.0, 1.0, -0.3])
def test_an_image_without_contrast_stays_as_it_is(shape: tuple[int, int, int], value: float) -> None:
    t = torch.tensor([0.0, 0.003, 0.01, 0.5, 0.99, 1.0])
    x = torch.full((len(t), *shape), value, requires_grad=True)
    end = EnergyPath().endpoint(x, t)
    torch.testing.assert_close(end.x, x, rtol=0, atol=1e-6)
    assert end.rate.abs().max() < 1e-4
    end.velocity_at(torch.zeros_like(x)).square().sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("scale", [1e-30, 1e-9, 1e-4, 1.0, 1e6])
def test_nothing_is_ever_nan(scale: float) -> None:
    """Also with a faint contrast, a single bright pixel, and times at and outside the ends of the release."""
    t = torch.tensor([0.0, 1e-7, 0.1, 0.1001, 0.45, 0.7999, 0.8, 1.0])
    x = scale * images((3, 6, 6), len(t)).float()
    x[::2] = 0
    x[::2, :, 2, 3] = scale
    for path in (EnergyPath(), EnergyPath(2.0, (0.1, 0.8))):
        end = path.endpoint(x, t)
        assert end.x.isfinite().all() and end.rate.isfinite().all()


def test_a_gradient_holds_the_blur_that_was_read_off_the_prediction() -> None:
    """Then v is linear in the prediction: |v(p + d) - v(p)| at the s and s' of p is what the gradient says."""
    path, p, t = PATHS[0], images((3, 6, 8), 1), 0.4
    d, w, z = (images((3, 6, 8), 1, seed) for seed in (1, 2, 3))
    p.requires_grad_()
    velocity = path.endpoint(p, torch.tensor([t], dtype=torch.float64)).velocity_at(z)
    (gradient,) = torch.autograd.grad((velocity * w).sum(), p)

    slow, step = Slow(p.detach()[0].numpy(), path.sigma0, *path.release), 1e-4
    rate = (slow.s(t + step) - slow.s(t - step)) / (2 * step)
    gain = np.exp(-slow.s(t) * slow.exponent)
    slow.spectrum = slow.waves[0] @ d[0].numpy() @ slow.waves[1].T
    change = slow.filtered(gain) / (1 - t) + t * slow.filtered(-slow.exponent * rate * gain)
    assert float((gradient * d).sum()) == pytest.approx(float((change * w[0].numpy()).sum()), rel=1e-5)


def test_images_of_a_batch_do_not_mix() -> None:
    x, t = images((3, 8, 8)), torch.tensor(T)
    together = EnergyPath().endpoint(x, t)
    for b in range(len(T)):
        alone = EnergyPath().endpoint(x[b : b + 1], t[b : b + 1])
        torch.testing.assert_close(together.x[b], alone.x[0], rtol=0, atol=1e-14)
        torch.testing.assert_close(together.rate[b], alone.rate[0], rtol=0, atol=1e-12)
