"""The discrete diffusion against Gaussian arithmetic done otherwise: Bayes' rule, torch.distributions, scipy."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch.distributions import Normal, kl_divergence

from pixelgen_fast.diffusion import ddpm
from pixelgen_fast.errors import InputError

TABLE = ddpm.table()


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_signal_is_a_squared_cosine_until_the_noise_is_held() -> None:
    """The product of 1 - beta telescopes to f(t + 1) / f(0); only the last steps have their beta held at 0.999."""
    f = np.cos((np.arange(1001) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
    signal = np.array(ddpm.cosine_signal())
    assert len(signal) == 1000 and (np.diff(signal) < 0).all()
    np.testing.assert_allclose(signal[:-1], f[1:-1] / f[0], rtol=1e-9)
    assert signal[-1] == pytest.approx(signal[-2] * 0.001)


def test_the_table_is_the_chain_of_all_steps() -> None:
    assert TABLE.shape == (1000, 6) and TABLE.dtype == torch.float32
    step = ddpm.at(TABLE, torch.tensor([0, 500, 999]))
    assert all(value.shape == (3, 1) for value in step)
    for place, t in enumerate([0, 500, 999]):
        wanted = ddpm.chain(ddpm.cosine_signal())[t]
        assert [float(value[place]) for value in step] == pytest.approx(list(wanted), rel=1e-6)


def test_kept_steps_span_the_chain() -> None:
    assert ddpm.kept_steps(1000) == list(range(1000)) and ddpm.kept_steps(2) == [0, 999]
    kept = ddpm.kept_steps(100)
    assert kept[:8] == [0, 10, 20, 30, 40, 50, 61, 71] and kept[-1] == 999
    for count in (1, 1001):
        with pytest.raises(InputError, match=f"steps is {count}; .* drawn in 2 to 1000"):
            ddpm.kept_steps(count)


@pytest.mark.parametrize("count", [1000, 25])
def test_a_step_back_is_bayes_rule(count: int) -> None:
    """q(u' | u, x) from the product of two Gaussians: u' given x, and u given u'."""
    kept = ddpm.kept_steps(count)
    signal = [ddpm.cosine_signal()[t] for t in kept]
    steps = ddpm.chain(signal)
    for i in (1, count // 2, count - 2):
        before, keep = signal[i - 1], signal[i] / signal[i - 1]
        x, u = 0.3, -0.7
        precision = 1 / (1 - before) + keep / (1 - keep)
        mean = (math.sqrt(before) * x / (1 - before) + math.sqrt(keep) * u / (1 - keep)) / precision
        assert steps[i].of_x * x + steps[i].of_u * u == pytest.approx(mean, rel=1e-9)
        assert math.exp(steps[i].log_posterior) == pytest.approx(1 / precision, rel=1e-9)
        assert math.exp(steps[i].log_beta) == pytest.approx(1 - keep, rel=1e-9)
    assert steps[0].log_posterior == steps[1].log_posterior and steps[0].of_u == 0


def loss_parts(t: int, output: torch.Tensor, x: torch.Tensor, e: torch.Tensor) -> tuple[torch.Tensor, ...]:
    times = torch.full((len(x),), t)
    step = ddpm.Step(*(value.double() for value in ddpm.at(TABLE, times)))
    u = ddpm.noised(x, e, step)
    return ddpm.losses(output, x, e, u, times, step), u, step


def test_the_loss_is_the_error_of_the_noise_and_the_bits_of_the_step() -> None:
    x, e, output = random(5, 7), random(5, 7, seed=1), random(5, 14, seed=2)
    found, u, _ = loss_parts(400, output, x, e)
    step = ddpm.chain(ddpm.cosine_signal())[400]
    e_hat, r = output.chunk(2, dim=1)
    x_hat = (u - step.noise * e_hat) / step.signal
    variance = torch.exp((r + 1) / 2 * step.log_beta + (1 - r) / 2 * step.log_posterior)
    truth = Normal(step.of_x * x + step.of_u * u, math.exp(step.log_posterior / 2))
    bits = kl_divergence(truth, Normal(step.of_x * x_hat + step.of_u * u, variance.sqrt())).mean(1) / math.log(2)
    torch.testing.assert_close(found, (e_hat - e).square().mean(1) + bits, rtol=1e-5, atol=1e-6)


def test_the_last_step_counts_the_likelihood_of_bins() -> None:
    """Against exact distribution functions; tanh approximates them to a few thousandths."""
    x = torch.tensor([[-1.0, -0.4, 0.1, 1.0]], dtype=torch.float64)
    e, output = random(1, 4, seed=1), torch.cat([random(1, 4, seed=1), random(1, 4, seed=3)], dim=1)
    found, u, step = loss_parts(0, output, x, e)
    mean, log_variance = (value.numpy() for value in ddpm.moments(*output.chunk(2, dim=1), u, step))
    law = stats.norm(mean, np.exp(log_variance / 2))
    above = np.where(x > 0.999, 1.0, law.cdf(x + 1 / 255))
    below = np.where(x < -0.999, 0.0, law.cdf(x - 1 / 255))
    bits = -np.log2(np.maximum(above - below, 1e-12)).mean()
    assert float(found) == pytest.approx(float((output[:, :4] - e).square().mean()) + bits, abs=0.02)


def test_the_bits_teach_the_variance_alone() -> None:
    x, e, output = random(5, 7), random(5, 7, seed=1), random(5, 14, seed=2).requires_grad_()
    loss_parts(400, output, x, e)[0].sum().backward()
    wanted = 2 * (output[:, :7].detach() - e) / 7
    torch.testing.assert_close(output.grad[:, :7], wanted)
    assert output.grad[:, 7:].abs().min() > 0


@pytest.mark.parametrize(("count", "error"), [(200, 0.02), (1000, 0.007)])
def test_the_true_noise_draws_the_data(count: int, error: float) -> None:
    """For data N(m, s^2) the noise that is expected given u is known; the chain ends in that data, up to its steps."""
    m, s, N = 0.5, 0.3, 20_000
    kept = ddpm.kept_steps(count)
    steps = ddpm.chain([ddpm.cosine_signal()[t] for t in kept])
    u = random(N, 1)
    for number, step in reversed([*enumerate(steps)]):
        spread = (step.signal * s) ** 2 + step.noise**2
        e_hat = step.noise * (u - step.signal * m) / spread
        noise = random(N, 1, seed=number) if number else None
        u = ddpm.draw_step(e_hat, torch.full_like(u, -1.0), u, step, noise)
    assert float(u.mean()) == pytest.approx(m, abs=0.007)
    assert float(u.std()) == pytest.approx(s, abs=error)
