"""Guidance of tokens: its schedule, what SoftCFG takes from a value, and tokens by inverse transform."""

import math

import numpy as np
import pytest
import torch

from pixelgen_fast.models.guided_tokens import FLOOR, SoftGuidance, guidance_weight, inverse_transform


@pytest.mark.parametrize(("gamma", "power"), [(13.0, 1.4), (6.0, 0.7), (1.0, 2.0)])
def test_guidance_begins_at_one_and_rises_towards_gamma(gamma: float, power: float) -> None:
    weights = [guidance_weight(s, 273, gamma, power) for s in range(273)]
    assert weights[0] == 1 and weights == sorted(weights) and weights[-1] <= gamma
    half = 273 * 0.5 ** (1 / power)  # where (s / N)^k is a half, the cosine is 0
    assert guidance_weight(half, 273, gamma, power) == pytest.approx((1 + gamma) / 2)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("step_norm", [False, True])
@pytest.mark.parametrize("strength", [1.0, 2.5])
def test_the_worth_of_a_value_is_the_formula_s(own: bool, step_norm: bool, strength: float) -> None:
    """Position by position, in Python's floats; the class keeps its value."""
    soft = SoftGuidance(step_norm=step_norm, strength=strength, own=own)
    q = torch.rand(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    q[0, 1:] = torch.tensor([0.9, 0, 0, 0, 0])  # one token has it all: the floor
    found = soft.worth(q)
    for row, (image, worth) in enumerate(zip(q.tolist(), found.tolist(), strict=True)):
        C = image[:-1] if own else image[1:]
        wanted = [1.0]
        for c in C:
            wanted.append(max(0.05, (1 - c / (sum(C) + 1e-5)) ** strength) if step_norm else 1 - c)
        assert worth == pytest.approx(wanted, rel=1e-12), row
    if step_norm and not own:
        assert found[0, 1] == FLOOR


def test_the_first_token_leaves_every_value_whole() -> None:
    """After it there is but the class behind; the published code never uses its confidence."""
    for step_norm in (False, True):
        assert SoftGuidance(step_norm=step_norm).worth(torch.tensor([[0.7]])).tolist() == [[1.0]]


def test_normed_steps_take_about_one_value_in_all() -> None:
    """Of many tokens, every one loses its share of one: sum_j (1 - W_j) = 1."""
    q = 0.05 + 0.9 * torch.rand(2, 200, dtype=torch.float64)
    lost = (1 - SoftGuidance().worth(q)).sum(-1)
    torch.testing.assert_close(lost, torch.ones_like(lost), rtol=1e-6, atol=0)


def test_confidence_is_the_token_s_probability_or_the_largest() -> None:
    logits, ids = torch.randn(4, 9, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 3, 8, 8])
    chances = np.exp(logits.double().numpy())
    chances /= chances.sum(1, keepdims=True)
    sampled, maximum = (SoftGuidance(kind).confidence_of(logits, ids) for kind in ("sampled", "maximum"))
    np.testing.assert_allclose(sampled, chances[range(4), ids.numpy()], rtol=1e-5)
    np.testing.assert_allclose(maximum, chances.max(1), rtol=1e-5)


def test_a_token_is_the_first_whose_cumulative_probability_is_above_u() -> None:
    logits = torch.randn(200, 7, generator=torch.Generator().manual_seed(2))
    u = torch.rand(200, generator=torch.Generator().manual_seed(3))
    for row, uniform, token in zip(logits.tolist(), u.tolist(), inverse_transform(logits, u).tolist(), strict=True):
        total = sum(map(math.exp, row))
        up_to = [sum(map(math.exp, row[: i + 1])) / total for i in range(7)]
        assert token == next(i for i, chance in enumerate(up_to) if chance > uniform)


def test_tokens_come_as_often_as_their_probability() -> None:
    chances = torch.tensor([0.5, 0.0, 0.3, 0.2])
    u = (torch.arange(1000) + 0.5) / 1000
    counts = inverse_transform(chances.log().expand(1000, -1), u).bincount(minlength=4)
    assert counts.tolist() == [500, 0, 300, 200]
    assert inverse_transform(torch.tensor([[0.0, -math.inf]]), torch.tensor([1 - 2.0**-24])).tolist() == [0]
