"""A model's gradient against its definition."""

import copy

import pytest
import torch
from torch import Tensor, nn


def check_gradient(model: nn.Module, inputs: tuple[Tensor, ...], weights: Tensor) -> None:
    """In float64, along a random direction in all parameters at once: d sum(model(inputs) * weights)."""
    (model(*inputs) * weights).sum().backward()
    direction = [torch.randn_like(p) for p in model.parameters()]
    slope = sum(float((p.grad * d).sum()) for p, d in zip(model.parameters(), direction, strict=True))

    def moved(h: float) -> float:
        other = copy.deepcopy(model)
        with torch.no_grad():
            for p, d in zip(other.parameters(), direction, strict=True):
                p.add_(d, alpha=h)
            return float((other(*inputs) * weights).sum())

    h = 1e-6
    assert (moved(h) - moved(-h)) / (2 * h) == pytest.approx(slope, rel=1e-6)
