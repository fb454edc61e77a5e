"""Denoising diffusion in steps, with a cosine schedule and a learned variance (arXiv 2102.09672), as MAR has it.

    beta_t = min(1 - f(t + 1) / f(t), 0.999),  f(t) = cos^2((t / T + 0.008) / 1.008 pi / 2),  abar_t = prod (1 - beta)
    u      = sqrt(abar_t) x + sqrt(1 - abar_t) e                           t = 0..T-1; t = 0 is almost clean here
    network(u, t) = (e^, r):   x^ = (u - sqrt(1 - abar) e^) / sqrt(abar),  mean = a x^ + b u,
                               log variance = s log beta + (1 - s) log posterior variance,  s = (r + 1) / 2
    loss   = mean (e^ - e)^2 + bits of a number: KL of the step's posterior to N(mean, variance), and for t = 0 the
             likelihood of the data in bins of 2 / 255. Its gradient goes to r alone.
    draw   u <- mean + sqrt(variance) temperature n,  from step to step of a chain in which some steps are left out

a = beta sqrt(abar') / (1 - abar), b = (1 - abar') sqrt(1 - beta) / (1 - abar) and the posterior variance
beta (1 - abar') / (1 - abar), abar' being that of the step before. Nothing else of this package counts time like this.
Shapes: N tokens of d numbers.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pixelgen_fast.errors import InputError

STEPS = 1000


class Step(NamedTuple):
    """What a step multiplies with: numbers, or tensors of one for each token [N, 1]."""

    signal: float | Tensor
    noise: float | Tensor
    of_x: float | Tensor
    of_u: float | Tensor
    log_beta: float | Tensor
    log_posterior: float | Tensor


def cosine_signal(steps: int = STEPS) -> list[float]:
    """abar of each step."""
    f = [math.cos((t / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(steps + 1)]
    return [*itertools.accumulate((1 - min(1 - after / now, 0.999) for now, after in itertools.pairwise(f)), _times)]


def kept_steps(count: int, steps: int = STEPS) -> list[int]:
    """`count` of the steps, evenly spaced from the first to the last. Raises InputError for a count out of range."""
    if not 2 <= count <= steps:
        raise InputError(f"steps is {count}; a diffusion of {steps} steps is drawn in 2 to {steps} of them")
    # summed up, as published: where a place lies between two steps, the rounding errors decide
    places = itertools.accumulate([(steps - 1) / (count - 1)] * (count - 1), initial=0.0)
    return [round(place) for place in places]


def chain(signal: list[float]) -> list[Step]:
    """The steps of a chain whose abar are these, the almost clean one first."""
    found = []
    for before, now in itertools.pairwise([1.0, *signal]):
        beta = 1 - now / before
        of_x = beta * math.sqrt(before) / (1 - now)
        of_u = (1 - before) * math.sqrt(1 - beta) / (1 - now)
        posterior = beta * (1 - before) / (1 - now)
        logs = (math.log(beta), math.log(posterior) if posterior else -math.inf)
        found.append(Step(math.sqrt(now), math.sqrt(1 - now), of_x, of_u, *logs))
    # the first step ends in data and has no posterior variance: it borrows that of the second
    return [found[0]._replace(log_posterior=found[1].log_posterior), *found[1:]]


def table() -> Tensor:
    """All steps of the whole chain: float32 [T, 6]."""
    return torch.tensor(chain(cosine_signal()), dtype=torch.float64).float()


def at(table_T6: Tensor, t_N: Tensor) -> Step:
    """The steps of each token, from the table."""
    return Step(*table_T6[t_N].unsqueeze(-1).unbind(1))


def noised(x: Tensor, e: Tensor, step: Step) -> Tensor:
    """u [N, d] of data and noise [N, d]."""
    return step.signal * x + step.noise * e


def moments(e_hat: Tensor, r: Tensor, u: Tensor, step: Step) -> tuple[Tensor, Tensor]:
    """(mean, log variance) of the step before, each [N, d]."""
    x_hat = (u - step.noise * e_hat) / step.signal
    share = (r + 1) / 2
    return step.of_x * x_hat + step.of_u * u, share * step.log_beta + (1 - share) * step.log_posterior


def losses(output: Tensor, x: Tensor, e: Tensor, u: Tensor, t_N: Tensor, step: Step) -> Tensor:
    """The loss of each token [N]; output: (e^, r) [N, 2 d], the rest [N, d] and [N]."""
    e_hat, r = output.chunk(2, dim=-1)
    mean, log_variance = moments(e_hat.detach(), r, u, step)
    posterior_mean = step.of_x * x + step.of_u * u
    kl = _gaussian_kl(posterior_mean, step.log_posterior, mean, log_variance)
    bits = torch.where(t_N == 0, -_log_likelihood(x, mean, log_variance).mean(-1), kl.mean(-1)) / math.log(2)
    return (e_hat - e).square().mean(-1) + bits


def draw_step(e_hat: Tensor, r: Tensor, u: Tensor, step: Step, noise: Tensor | None) -> Tensor:
    """u of the step before; noise: scaled already, None where the step ends in data."""
    mean, log_variance = moments(e_hat, r, u, step)
    return mean if noise is None else mean + (0.5 * log_variance).exp() * noise


def _times(a: float, b: float) -> float:
    return a * b


def _gaussian_kl(mean1: Tensor, log1: Tensor | float, mean2: Tensor, log2: Tensor) -> Tensor:
    return 0.5 * (log2 - log1 - 1 + (log1 - log2).exp() + (mean1 - mean2).square() * (-log2).exp())


def _log_likelihood(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Of x in bins of 2 / 255 under a Gaussian, whose distribution is approximated by tanh; the outer bins are open."""
    inverse = (-0.5 * log_variance).exp()
    below, above = (_distribution(inverse * (x - mean + side / 255)) for side in (-1, 1))
    floor = 1e-12
    inner = (above - below).clamp(min=floor).log()
    outer = torch.where(x > 0.999, (1 - below).clamp(min=floor).log(), inner)
    return torch.where(x < -0.999, above.clamp(min=floor).log(), outer)


def _distribution(x: Tensor) -> Tensor:
    return 0.5 * (1 + F.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
