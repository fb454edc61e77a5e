"""Nearest neighbours against scikit-learn, and the effective rank of sets whose rank is known."""

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from pixelgen_fast.eval.neighbours import effective_rank, knn_accuracy, knn_predict


def draw(count: int, seed: int, width: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Overlapping classes, 0 to 4, so that votes are seldom unanimous."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 5, count)
    centres = np.random.default_rng(99).standard_normal((5, width))
    return torch.from_numpy(centres[labels] + 1.2 * rng.standard_normal((count, width))), torch.from_numpy(labels)


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (5, 0.5), (20, 0.07), (200, 0.1)])
def test_the_same_votes_as_scikit_learn(k: int, temperature: float) -> None:
    bank, labels = draw(200, 0)
    queries, truth = draw(300, 1)
    judge = KNeighborsClassifier(k, metric="cosine", weights=lambda distance: np.exp((1 - distance) / temperature))
    judge.fit(bank.numpy(), labels.numpy())
    predicted = knn_predict(bank, labels, queries, k=k, temperature=temperature)
    np.testing.assert_array_equal(predicted, judge.predict(queries.numpy()))
    accuracy = knn_accuracy(bank, labels, queries, truth, k=k, temperature=temperature)
    assert accuracy == pytest.approx(judge.score(queries.numpy(), truth.numpy()), abs=1e-12)
    assert 0.4 < accuracy < 0.95


def test_a_low_temperature_does_not_overflow() -> None:
    bank, labels = draw(50, 0)
    assert knn_accuracy(bank.float(), labels, bank.float(), labels, k=20, temperature=1e-4) == 1


def test_effective_rank() -> None:
    """One line: 1. Equal deviations along r orthogonal directions: r. Constant features: 0. A mean changes nothing."""
    r, width = 7, 20
    corners = torch.cat([torch.eye(width)[:r], -torch.eye(width)[:r]])
    assert effective_rank(corners) == pytest.approx(r, rel=1e-9)
    assert effective_rank(corners + 5) == pytest.approx(r, rel=1e-4)
    line = torch.linspace(-1, 1, 50)[:, None] * torch.randn(1, width, generator=torch.Generator().manual_seed(0))
    assert effective_rank(line) == pytest.approx(1, abs=1e-3)
    assert effective_rank(torch.ones(10, width)) == 0
    p = np.array([4.0, 2.0, 1.0]) / 7
    stretched = torch.cat([torch.diag(torch.tensor([4.0, 2.0, 1.0])), -torch.diag(torch.tensor([4.0, 2.0, 1.0]))])
    assert effective_rank(stretched) == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-9)


def test_bad_input_is_named() -> None:
    bank, labels = draw(10, 0)
    with pytest.raises(ValueError, match="k is 11 and the bank holds 10 features"):
        knn_predict(bank, labels, bank, k=11)
    with pytest.raises(ValueError, match=r"got \[10, 6\], \[10\], \[10, 5\]"):
        knn_predict(bank, labels, bank[:, :5], k=3)
