"""The Fréchet distance against scipy's matrix square root and closed forms."""

import numpy as np
import pytest
import torch
from scipy import linalg

from pixelgen_fast.eval.frechet import frechet_distance, frechet_of_moments, moments


def draw(count: int, width: int, seed: int) -> np.ndarray:
    """Correlated features with their own mean and scale, [count, width]."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal((count, width)) @ rng.standard_normal((width, width)) + rng.standard_normal(width)


@pytest.mark.parametrize(("n", "m", "width"), [(200, 150, 1), (200, 150, 7), (400, 300, 40)])
def test_against_the_matrix_square_root(n, m, width):
    """|m_a - m_b|^2 + tr(A + B - 2 sqrtm(A B)) with scipy.linalg.sqrtm, which does not assume symmetry."""
    a, b = draw(n, width, 0), draw(m, width, 1)
    cov_a, cov_b = (np.atleast_2d(np.cov(v.T)) for v in (a, b))
    root = np.atleast_2d(linalg.sqrtm(cov_a @ cov_b)).real
    expected = np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(cov_a + cov_b - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(torch.from_numpy(a), torch.from_numpy(b)) == frechet_distance(a, b)


def test_closed_form_of_diagonal_gaussians():
    """|m_a - m_b|^2 + sum (s_a - s_b)^2, also where deviations are zero (constant features)."""
    mean_a, mean_b = np.array([0.0, 1.0, 2.0, 3.0]), np.array([1.0, 1.0, 0.0, 3.5])
    dev_a, dev_b = np.array([1.0, 0.0, 2.0, 0.0]), np.array([0.5, 0.0, 0.0, 4.0])
    expected = np.sum((mean_a - mean_b) ** 2) + np.sum((dev_a - dev_b) ** 2)
    value = frechet_of_moments(mean_a, np.diag(dev_a**2), mean_b, np.diag(dev_b**2))
    assert value == pytest.approx(expected, rel=1e-12)


def test_singular_covariances():
    """Fewer samples than features. The distance of a set to itself is 0; a shift by c gives |c|^2; a scale by k about
    the mean gives (1 - k)^2 tr A, for any A."""
    a = draw(20, 64, 2)
    scale = np.trace(np.cov(a.T))
    assert abs(frechet_distance(a, a)) < 1e-9 * scale
    assert frechet_distance(a, a + 3.0) == pytest.approx(9.0 * 64, rel=1e-9)
    stretched = a.mean(0) + 1.5 * (a - a.mean(0))
    assert frechet_distance(a, stretched) == pytest.approx(0.25 * scale, rel=1e-9)
    assert frechet_distance(a, draw(15, 64, 3)) == pytest.approx(frechet_distance(draw(15, 64, 3), a), rel=1e-9)


def test_float32_input_is_computed_in_float64():
    a, b = draw(100, 8, 4).astype(np.float32) + 1000, draw(100, 8, 5).astype(np.float32) + 1000
    expected = frechet_distance(a.astype(np.float64) - 1000, b.astype(np.float64) - 1000)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_bad_features_are_named():
    a = draw(10, 4, 0)
    with pytest.raises(ValueError, match="have 4 and 3 features"):
        frechet_distance(a, a[:, :3])
    with pytest.raises(ValueError, match=r"b must be .* at least 2 samples, got \[1, 4\]"):
        frechet_distance(a, a[:1])
    with pytest.raises(ValueError, match=r"got \[10\]"):
        moments(a[:, 0])
    with pytest.raises(ValueError, match="a holds 1 values that are not finite"):
        frechet_distance(np.where(a == a[2, 1], np.nan, a), a)
