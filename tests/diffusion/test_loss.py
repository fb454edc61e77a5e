"""The flow-matching loss against sums written out in float64, image by image."""

import itertools

import numpy as np
import pytest
import torch

from pixelgen_fast.diffusion.loss import flow_loss
from pixelgen_fast.diffusion.path import add_noise, convert, truth

PAIRS = list(itertools.product("vxe", repeat=2))


def draw():
    """prediction, x, e [5, 3, 4, 6] and t [5], float32; t reaches into both floors of the divisors."""
    g = torch.Generator().manual_seed(3)
    p, x, e = (torch.randn(5, 3, 4, 6, generator=g) for _ in range(3))
    return p, x, e, torch.tensor([0.02, 0.3, 0.5, 0.8, 0.97])


@pytest.mark.parametrize("s", [1.0, 1.7])
@pytest.mark.parametrize(("predict", "space"), PAIRS)
def test_loss_is_the_error_between_converted_prediction_and_converted_truth(predict, space, s):
    """Its definition: both go through the same conversion, then a mean over channels and pixels."""
    p, x, e, t = (v.double() for v in draw())
    z = add_noise(x, e, t, s)
    both = [convert(q, z, t, predict, space, s) for q in (p, truth(predict, x, e, s))]
    expected = ((both[0] - both[1]) ** 2).mean(dim=(1, 2, 3))
    torch.testing.assert_close(
        flow_loss(p, x, e, t, predict=predict, loss_space=space, noise_scale=s), expected, rtol=1e-12, atol=0
    )


def test_pixeldit_loss():
    """v-prediction, v-space, weight 1: mean (net - (x - e))^2."""
    p, x, e, _ = (v.double().numpy() for v in draw())
    expected = [np.mean((p[b] - (x[b] - e[b])) ** 2) for b in range(5)]
    np.testing.assert_allclose(flow_loss(*draw()), expected, rtol=1e-5)


def test_jit_loss():
    """x-prediction, v-space: v = (x-z)/max(1-t, 0.05) and v_hat = (net-z)/max(1-t, 0.05), mean (v - v_hat)^2."""
    p, x, e, t = (v.double().numpy() for v in draw())
    expected = []
    for b in range(5):
        z = t[b] * x[b] + (1 - t[b]) * e[b]
        v, v_hat = ((q - z) / max(1 - t[b], 0.05) for q in (x[b], p[b]))
        expected.append(np.mean((v - v_hat) ** 2))
    np.testing.assert_allclose(flow_loss(*draw(), predict="x"), expected, rtol=1e-5)


@pytest.mark.parametrize(("predict", "space"), PAIRS)
def test_the_truth_costs_nothing_anywhere(predict, space):
    _, x, e, t = draw()
    loss = flow_loss(truth(predict, x, e), x, e, t, predict=predict, loss_space=space)
    assert torch.equal(loss, torch.zeros(5))


def test_weight_multiplies_each_image():
    p, x, e, t = draw()
    w = torch.tensor([0.0, 1.0, 2.0, 0.5, 3.0])
    torch.testing.assert_close(flow_loss(p, x, e, t, weight=w), w * flow_loss(p, x, e, t))


def test_bfloat16_predictions_are_scored_in_float32():
    p, x, e, t = draw()
    p = p.to(torch.bfloat16).requires_grad_()
    loss = flow_loss(p, x, e, t)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, flow_loss(p.detach().double(), x, e, t).float(), rtol=1e-6, atol=0)
    loss.mean().backward()
    expected = 2 * (p.detach().float() - (x - e)) / p[0].numel() / 5
    torch.testing.assert_close(p.grad, expected.to(torch.bfloat16))


def test_bad_arguments_are_named():
    p, x, e, t = draw()
    with pytest.raises(ValueError, match=r"prediction \[5, 1, 4, 6\], x \[5, 3, 4, 6\]"):
        flow_loss(p[:, :1], x, e, t)
    with pytest.raises(ValueError, match=r"one time per image, \[5\], got \[5, 1\]"):
        flow_loss(p, x, e, t[:, None])
    with pytest.raises(ValueError, match=r"weight must hold one number per image, \[5\], got \[\]"):
        flow_loss(p, x, e, t, weight=torch.tensor(2.0))
    with pytest.raises(ValueError, match="loss_space='eps' is not a prediction"):
        flow_loss(p, x, e, t, loss_space="eps")
