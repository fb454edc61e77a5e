"""The linear path from noise to data, and the conversions between what a network may predict.

    z = t x + (1-t) s e        v = dz/dt = x - s e        x = z + (1-t) v        s e = z - t v

x data, e standard normal noise, z noised, t in [0, 1] (t=0 noise, t=1 data), v velocity, s the noise scale (JiT uses
resolution / 256; PixelDiT 1). A network predicts one of x, v, e; z and t then give the other two. Leaving x divides by
1-t and leaving e divides by t, so these divisors are held at t_eps or above (JiT, arXiv 2511.13720, section 4: 0.05).

Shapes: z, x, e, v [B, ...]; t [B], broadcast over whatever follows. Arithmetic is in float32 or wider.
"""

from __future__ import annotations

from typing import NamedTuple, get_args

import torch
from einops import rearrange
from pixelgen_kernels import philox
from torch import Tensor

from pixelgen_fast.settings import Prediction


class Noising(NamedTuple):
    """How images are noised: at their times t float32 [B], with noise_scale times the noise of (seed, image number).

    numbers: int64 [B], image numbers. seed: of the run.
    """

    numbers: Tensor
    t: Tensor
    seed: int
    noise_scale: float

    def of(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(z, x, e) of uint8 images [B, S, S, 3], each float32 [B, 3, S, S]; or of data [B, ...], each so."""
        x, e = self.pair(images)
        return add_noise(x, e, self.t, self.noise_scale), x, e

    def pair(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(x, e) of the images, as `of` has them."""
        x = to_unit(images) if images.dtype == torch.uint8 else images
        return x, philox.normal(self.seed, self.numbers, philox.NOISE, x[:1].numel()).view_as(x)


def to_unit(images: Tensor) -> Tensor:
    """uint8 [B, S, S, 3] as float32 [B, 3, S, S] in [-1, 1]."""
    return rearrange(images, "B H W C -> B C H W").float() / 127.5 - 1.0


def to_fractions(images: Tensor) -> Tensor:
    """uint8 [B, S, S, 3] as float32 [B, 3, S, S] in [0, 1], as encoders and tokenizers of others read them."""
    return rearrange(images, "B H W C -> B C H W").float() / 255


def add_noise(x: Tensor, e: Tensor, t: Tensor, noise_scale: float = 1.0) -> Tensor:
    """Noised images z = t x + (1-t) s e.

    x, e: [B, ...]. t: [B] in [0, 1]. Returns [B, ...] in float32, or float64 if an input is. Raises ValueError if the
    shapes disagree.
    """
    if x.shape != e.shape:
        raise ValueError(f"data and noise must have one shape, got x {list(x.shape)} and e {list(e.shape)}")
    x, e = widen(x), widen(e)
    t = per_image(t, x)
    return t * x + (1 - t) * noise_scale * e


def truth(predict: Prediction, x: Tensor, e: Tensor, noise_scale: float = 1.0) -> Tensor:
    """What a network that predicts `predict` should answer: x, e or v = x - s e; in float32 or wider."""
    check_prediction(predict, "predict")
    x, e = widen(x), widen(e)
    return {"x": x, "e": e, "v": x - noise_scale * e}[predict]


def convert(
    prediction: Tensor,
    z: Tensor,
    t: Tensor,
    source: Prediction,
    target: Prediction,
    noise_scale: float = 1.0,
    t_eps: float = 0.05,
) -> Tensor:
    """Read a prediction of `source` as a prediction of `target`, given the noised images and their times.

    prediction, z: [B, ...]. t: [B]. t_eps: the least divisor, used for 1-t when the source is x and for t when it is e.
    Returns [B, ...] in float32 or wider. Raises ValueError for an unknown quantity or shapes that disagree.
    """
    check_prediction(source, "source")
    check_prediction(target, "target")
    if prediction.shape != z.shape:
        raise ValueError(f"prediction {list(prediction.shape)} and z {list(z.shape)} must have one shape")
    p, z = widen(prediction), widen(z)
    if source == target:
        return p
    t, s = per_image(t, p), noise_scale
    match source, target:
        case "v", "x":
            return z + (1 - t) * p
        case "v", "e":
            return (z - t * p) / s
        case "x", "v":
            return (p - z) / (1 - t).clamp(min=t_eps)
        case "x", "e":
            return (z - t * p) / ((1 - t).clamp(min=t_eps) * s)
        case "e", "v":
            return (z - s * p) / t.clamp(min=t_eps)
        case "e", "x":
            return (z - (1 - t) * s * p) / t.clamp(min=t_eps)


def slope(t: Tensor, source: Prediction, target: Prediction, noise_scale: float = 1.0, t_eps: float = 0.05) -> Tensor:
    """The factor by which `convert` stretches a prediction: d target / d source at fixed z, a function of t alone.

    t: [B]. Returns [B]. Two predictions of `source` that differ by d are read as predictions of `target` that differ by
    slope * d, so the squared error in one space is slope^2 times that in the other.
    """
    check_prediction(source, "source")
    check_prediction(target, "target")
    t, s = widen(t), noise_scale
    from_x, from_e = (1 - t).clamp(min=t_eps), t.clamp(min=t_eps)
    return {
        ("v", "x"): 1 - t,
        ("v", "e"): -t / s,
        ("x", "v"): 1 / from_x,
        ("x", "e"): -t / (from_x * s),
        ("e", "v"): -s / from_e,
        ("e", "x"): -(1 - t) * s / from_e,
    }.get((source, target), torch.ones_like(t))


def per_image(value: Tensor, like: Tensor) -> Tensor:
    """Shape one number per image [B] so that it broadcasts over `like` [B, ...]: [B, 1, ..., 1]."""
    if value.shape != like.shape[:1]:
        raise ValueError(f"expected one number per image, [{like.shape[0]}], got {list(value.shape)}")
    return widen(value).reshape(-1, *[1] * (like.ndim - 1))


def widen(tensor: Tensor) -> Tensor:
    """At least float32: bfloat16 and float16 go up, float64 stays."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def check_prediction(name: str, argument: str) -> None:
    """Raise ValueError unless `name` is one of v, x, e."""
    if name not in get_args(Prediction):
        raise ValueError(f"{argument}={name!r} is not a prediction; use 'v' (velocity), 'x' (data) or 'e' (noise)")
