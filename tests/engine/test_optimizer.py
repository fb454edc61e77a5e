"""AdamWEMA over 20 steps against float64 formulas and PyTorch's AdamW; what a bad gradient may not touch."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from pixelgen_fast.engine.optimizer import AdamWEMA
from pixelgen_fast.runs.checkpoint import ema_key

STEPS, LR, BETAS, EPS = 20, 2e-3, (0.9, 0.95), 1e-8
DECAYS = (0.9, 0.999)
WEIGHT_DECAY = (0.1, 0.0)


def gradients(shapes: list[tuple[int, ...]]) -> list[list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [[torch.randn(shape, generator=generator) for shape in shapes] for _ in range(STEPS)]


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in [(7, 5), (11,)]]


def groups(params: list[nn.Parameter]) -> list[dict]:
    return [{"params": [p], "weight_decay": w} for p, w in zip(params, WEIGHT_DECAY, strict=True)]


def run(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], grads: list[list[torch.Tensor]]) -> None:
    for step in grads:
        for param, grad in zip(params, step, strict=True):
            param.grad = grad.clone()
        optimizer.step()


def relative_error(got: torch.Tensor, want: np.ndarray) -> float:
    return float(np.linalg.norm(got.detach().double().numpy() - want) / np.linalg.norm(want))


@pytest.mark.parametrize("warmup", [False, True])
def test_twenty_steps_follow_the_formulas(warmup):
    params = parameters()
    start = [p.detach().double().numpy() for p in params]
    grads = gradients([p.shape for p in params])
    optimizer = AdamWEMA(groups(params), lr=LR, betas=BETAS, eps=EPS, ema_decays=DECAYS, ema_warmup=warmup)
    run(optimizer, params, grads)

    for number, (param, p, weight_decay) in enumerate(zip(params, start, WEIGHT_DECAY, strict=True)):
        m, v, averages = np.zeros_like(p), np.zeros_like(p), {d: p.copy() for d in DECAYS}
        for s in range(1, STEPS + 1):
            g = grads[s - 1][number].double().numpy()
            m = BETAS[0] * m + (1 - BETAS[0]) * g
            v = BETAS[1] * v + (1 - BETAS[1]) * g * g
            hat = (m / (1 - BETAS[0] ** s)) / (np.sqrt(v / (1 - BETAS[1] ** s)) + EPS)
            p = p - LR * weight_decay * p - LR * hat
            for decay in DECAYS:
                now = min(decay, (1 + s) / (10 + s)) if warmup else decay
                averages[decay] = now * averages[decay] + (1 - now) * p
        state = optimizer.state[param]
        assert relative_error(param, p) < 1e-6
        assert relative_error(state["exp_avg"], m) < 1e-6
        assert relative_error(state["exp_avg_sq"], v) < 1e-6
        for decay in DECAYS:
            assert relative_error(state[ema_key(decay)], averages[decay]) < 1e-6


def test_twenty_steps_agree_with_pytorch():
    ours, theirs = parameters(), parameters()
    grads = gradients([p.shape for p in ours])
    run(AdamWEMA(groups(ours), lr=LR, betas=BETAS, eps=EPS), ours, grads)
    run(torch.optim.AdamW(groups(theirs), lr=LR, betas=BETAS, eps=EPS, foreach=False), theirs, grads)
    assert all(relative_error(a, b.detach().double().numpy()) < 1e-6 for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_gradient_is_as_if_it_had_not_been(bad):
    clean, met = parameters(), parameters()
    grads = gradients([p.shape for p in clean])
    expected = AdamWEMA(groups(clean), lr=LR, ema_decays=DECAYS, ema_warmup=True)
    run(expected, clean, grads[:6])

    optimizer = AdamWEMA(groups(met), lr=LR, ema_decays=DECAYS, ema_warmup=True)
    wrong = copy.deepcopy(grads[0])
    wrong[1][3] = bad
    run(optimizer, met, [wrong, *grads[:3], wrong, wrong])
    assert optimizer.scalars() == {"step": 3, "skipped": 3, "skipped_in_a_row": 2}
    run(optimizer, met, grads[3:6])

    assert optimizer.scalars() == {"step": 6, "skipped": 3, "skipped_in_a_row": 0}
    for a, b in zip(met, clean, strict=True):
        assert torch.equal(a, b)
        assert all(torch.equal(optimizer.state[a][key], expected.state[b][key]) for key in expected.state[b])


def test_clipping_is_that_of_pytorch():
    ours, theirs = parameters(), parameters()
    grads = gradients([p.shape for p in ours])
    run(AdamWEMA(groups(ours), lr=LR, betas=BETAS, eps=EPS, clip_norm=2.0), ours, grads)
    reference = torch.optim.AdamW(groups(theirs), lr=LR, betas=BETAS, eps=EPS, foreach=False)
    for step in grads:
        for param, grad in zip(theirs, step, strict=True):
            param.grad = grad.clone()
        assert torch.nn.utils.clip_grad_norm_(theirs, 2.0) > 2.0, "or clipping is not tested"
        reference.step()
    assert all(relative_error(a, b.detach().double().numpy()) < 1e-6 for a, b in zip(ours, theirs, strict=True))


def test_a_group_can_be_trained_and_not_averaged():
    averaged, projector = parameters()
    optimizer = AdamWEMA([{"params": [averaged]}, {"params": [projector], "ema": False}], ema_decays=DECAYS)
    run(optimizer, [averaged, projector], gradients([averaged.shape, projector.shape])[:1])
    assert set(optimizer.state[averaged]) == {"exp_avg", "exp_avg_sq", "ema_0.9", "ema_0.999"}
    assert set(optimizer.state[projector]) == {"exp_avg", "exp_avg_sq"}


def test_the_averages_start_at_the_weights_and_the_learning_rate_can_be_set():
    params = parameters()
    optimizer = AdamWEMA(groups(params), lr=LR, ema_decays=(0.9,))
    optimizer.set_lr(0.0)
    run(optimizer, params, gradients([p.shape for p in params])[:2])
    for param, start in zip(params, parameters(), strict=True):
        assert torch.equal(param, start)
        assert torch.equal(optimizer.state[param]["ema_0.9"], start)


def test_the_norm_given_decides_not_the_gradients_held():
    params = parameters()
    optimizer = AdamWEMA(params, lr=LR)
    optimizer.grad_norm = lambda: torch.tensor(float("inf"))
    run(optimizer, params, gradients([p.shape for p in params])[:1])
    optimizer.end_step(optimizer.grad_norm())
    assert all(torch.equal(p, q) for p, q in zip(params, parameters(), strict=True))
    assert optimizer.scalars() == {"step": 0, "skipped": 1, "skipped_in_a_row": 1}


def test_counters_survive_a_checkpoint():
    optimizer = AdamWEMA(parameters())
    optimizer.load_scalars({"step": 12, "skipped": 3, "skipped_in_a_row": 1})
    assert optimizer.scalars() == {"step": 12, "skipped": 3, "skipped_in_a_row": 1}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(ema_decays=(1.0,)), r"ema_decays must be distinct and in \[0, 1\), got \[1.0\]"),
        (dict(ema_decays=(0.9, 0.9)), "distinct"),
        (dict(betas=(0.9, 1.0)), r"param group 0: betas must be in \[0, 1\)"),
        (dict(lr=-1.0), "param group 0: lr must not be negative, got -1.0"),
        (dict(weight_decay=-0.1), "weight_decay must not be negative"),
        (dict(clip_norm=0.0), "clip_norm must be positive, or None for no clipping, got 0.0"),
    ],
)
def test_values_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        AdamWEMA(parameters(), **arguments)
