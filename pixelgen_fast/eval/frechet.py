"""Fréchet distance between two sets of feature vectors, each taken as a Gaussian (Heusel et al., arXiv 1706.08500).

    d = |m_a - m_b|^2 + tr A + tr B - 2 tr (A B)^(1/2),      tr (A B)^(1/2) = sum of singular values of A^(1/2) B^(1/2)

m mean, A and B covariances. The square roots come from symmetric eigendecompositions with eigenvalues held at 0 or
above, so singular covariances (constant features, fewer samples than features) need no ridge. The estimate is biased
upwards, by an amount that falls as 1 / number of samples: compare only distances of equal counts.

Shapes: N, M samples; D features.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

Features = np.ndarray | Tensor


def frechet_distance(a: Features, b: Features) -> float:
    """Fréchet distance (squared, as FID reports it) between samples a [N, D] and b [M, D], in float64.

    Raises ValueError for fewer than two samples, for feature counts that differ and for values that are not finite.
    """
    return frechet_of_moments(*moments(a, "a"), *moments(b, "b"))


def moments(features: Features, name: str = "features") -> tuple[np.ndarray, np.ndarray]:
    """Mean [D] and unbiased covariance [D, D] of features [N, D], in float64."""
    values = np.asarray(features.detach().cpu() if isinstance(features, Tensor) else features, dtype=np.float64)
    if values.ndim != 2 or values.shape[0] < 2:
        raise ValueError(f"{name} must be [samples, features] with at least 2 samples, got {list(values.shape)}")
    if not np.isfinite(values).all():
        raise ValueError(f"{name} holds {np.count_nonzero(~np.isfinite(values))} values that are not finite")
    return values.mean(axis=0), np.atleast_2d(np.cov(values, rowvar=False))


def frechet_of_moments(mean_a: np.ndarray, cov_a: np.ndarray, mean_b: np.ndarray, cov_b: np.ndarray) -> float:
    """Fréchet distance between N(mean_a, cov_a) and N(mean_b, cov_b); means [D], covariances [D, D]."""
    if mean_a.shape != mean_b.shape:
        raise ValueError(f"the two sets have {mean_a.shape[0]} and {mean_b.shape[0]} features; they must be the same")
    cross = np.linalg.svd(_square_root(cov_a) @ _square_root(cov_b), compute_uv=False).sum()
    return float(np.sum((mean_a - mean_b) ** 2) + np.trace(cov_a) + np.trace(cov_b) - 2 * cross)


def _square_root(cov: np.ndarray) -> np.ndarray:
    """The symmetric square root of a positive semidefinite matrix."""
    values, vectors = np.linalg.eigh(cov)
    return (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
