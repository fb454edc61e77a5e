"""Mean and covariance of features that come batch by batch, in float64.

Of n numbers with mean m and scatter S = sum (x - m)(x - m)^T, and a batch of k more with m' and S' (Chan, Golub and
LeVeque, 1979):    m <- m + k d / (n + k),    S <- S + S' + n k / (n + k) d d^T,    d = m' - m.

Shapes: N samples, D features.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


class Moments:
    """count: N so far."""

    def __init__(self) -> None:
        self.count = 0
        self._mean = self._scatter = torch.zeros(0, dtype=torch.float64)

    def add(self, features: Tensor) -> None:
        """features: [k, D]."""
        x = features.double()
        mean = x.mean(dim=0)
        centred = x - mean
        scatter = centred.T @ centred
        if not self.count:
            self.count, self._mean, self._scatter = len(x), mean, scatter
            return
        n, k, apart = self.count, len(x), mean - self._mean
        self._scatter += scatter + (n * k / (n + k)) * torch.outer(apart, apart)
        self._mean += k / (n + k) * apart
        self.count = n + k

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean [D] and unbiased covariance [D, D], for two samples or more."""
        return self._mean.numpy(), (self._scatter / (self.count - 1)).numpy()
