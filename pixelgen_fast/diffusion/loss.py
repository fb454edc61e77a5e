"""The flow-matching loss, with the predicted quantity and the space of the error as separate choices.

    loss_b = w_b mean_{C,H,W} |convert(prediction) - convert(truth)|^2 = w_b slope(t_b)^2 mean |prediction - truth|^2

`predict` is what the network answers (v, x or e), `loss_space` is where the error is measured. Reading one quantity as
another is affine in it with a slope that depends on t alone (path.py), and truth goes the same way as the prediction,
so a loss space is exactly a weight per image, and the divisor's floor t_eps never moves the minimum. Examples:
PixelDiT is predict v in space v: weight 1. JiT is predict x in space v: weight 1 / max(1-t, 0.05)^2.

Shapes: B images, C channels, H x W pixels.
"""

from __future__ import annotations

from torch import Tensor

from pixelgen_fast.diffusion.path import Prediction, check_prediction, slope, truth, widen


def flow_loss(
    prediction: Tensor,
    x: Tensor,
    e: Tensor,
    t: Tensor,
    *,
    predict: Prediction = "v",
    loss_space: Prediction = "v",
    noise_scale: float = 1.0,
    t_eps: float = 0.05,
    weight: Tensor | None = None,
) -> Tensor:
    """Squared error of each image, averaged over its channels and pixels.

    prediction: [B, C, H, W], the network's answer at z = add_noise(x, e, t, noise_scale), any float dtype.
    x, e: [B, C, H, W], data in [-1, 1] and standard normal noise. t: [B] in [0, 1].
    predict: what the network answers. loss_space: where the error is measured.
    weight: [B], an extra factor per image; None is 1.
    Returns float32 [B] (float64 if an input is); the training loss is its mean over the global batch.
    Raises ValueError for an unknown quantity or shapes that disagree.
    """
    check_prediction(predict, "predict")
    check_prediction(loss_space, "loss_space")
    if not prediction.shape == x.shape == e.shape:
        shapes = f"prediction {list(prediction.shape)}, x {list(x.shape)}, e {list(e.shape)}"
        raise ValueError(f"prediction, data and noise must have one shape, got {shapes}")
    if t.shape != x.shape[:1]:
        raise ValueError(f"t must hold one time per image, [{x.shape[0]}], got {list(t.shape)}")
    if weight is not None and weight.shape != t.shape:
        raise ValueError(f"weight must hold one number per image, {list(t.shape)}, got {list(weight.shape)}")
    error = (widen(prediction) - truth(predict, x, e, noise_scale)).square().flatten(1).mean(dim=1)
    if predict != loss_space:
        error = error * slope(t, predict, loss_space, noise_scale, t_eps).square()
    return error if weight is None else error * widen(weight)
