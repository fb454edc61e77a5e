"""From noise to images: time grid, solvers of dz/dt = v(z, t), guidance, and the sampler.

    grid      t_i = shift_time(end i / N, shift), i = 0..N
    euler     z += h v(z, t)
    heun      z += h (v(z, t) + v(z + h v(z, t), t + h)) / 2, the last step Euler (JiT); 2N - 1 evaluations
    adams2    z += h (3 v_i - v_{i-1}) / 2, the first step Euler: two-step Adams-Bashforth with these coefficients on a
              shifted grid too, which is PixelDiT's "FlowDPMSolver"; N evaluations
    guidance  v = u + w (c - u) for lo < t < hi, else c; c is the velocity with the label, u that with the null class
              (Ho & Salimans, arXiv 2207.12598; interval: Kynkäänniemi et al., arXiv 2404.07724) or of a weaker
              prediction with the same label (autoguidance: Karras et al., arXiv 2406.02507)

The start of sample n is a function of (seed, n), so a sample does not depend on what shares its batch.

Shapes: N samples in batches of B; z, v [B, C, H, W]; t a Python number, shared by the batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
from einops import rearrange
from pixelgen_kernels import philox
from torch import Tensor
from tqdm import tqdm

from pixelgen_fast.diffusion.energy import EnergyPath
from pixelgen_fast.diffusion.path import Prediction, check_prediction, convert
from pixelgen_fast.diffusion.time import noise, shift_time
from pixelgen_fast.errors import InputError
from pixelgen_fast.settings import Solver

Field = Callable[[Tensor, float], Tensor]
Model = Callable[[Tensor, Tensor, Tensor], Tensor]
Pair = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def time_grid(steps: int, shift: float = 1.0, end: float = 1.0) -> list[float]:
    """Times of a run of `steps` steps: steps + 1 numbers from exactly 0 to shift_time(end), which is 1 for 1."""
    if steps < 1:
        raise InputError(f"sampling needs at least 1 step, got {steps}")
    if not 0 < end <= 1:
        raise InputError(f"the end of a grid of times must be in (0, 1], got {end}")
    return [shift_time(end * (i / steps), shift) for i in range(steps + 1)]


def euler(field: Field, z: Tensor, grid: Sequence[float]) -> Iterator[Tensor]:
    """Yield z after each Euler step along the grid."""
    for t, t_next in itertools.pairwise(grid):
        z = z + (t_next - t) * field(z, t)
        yield z


def heun(field: Field, z: Tensor, grid: Sequence[float]) -> Iterator[Tensor]:
    """Yield z after each Heun step along the grid; the last step is Euler, so the field is never asked at the end."""
    for t, t_next in itertools.pairwise(grid[:-1]):
        h, v = t_next - t, field(z, t)
        z = z + h * 0.5 * (v + field(z + h * v, t_next))
        yield z
    yield from euler(field, z, grid[-2:])


def adams2(field: Field, z: Tensor, grid: Sequence[float]) -> Iterator[Tensor]:
    """Yield z after each two-step Adams-Bashforth step along the grid; the first step is Euler."""
    before = None
    for t, t_next in itertools.pairwise(grid):
        v = field(z, t)
        z = z + (t_next - t) * (v if before is None else 1.5 * v - 0.5 * before)
        before = v
        yield z


SOLVERS: dict[str, Callable[[Field, Tensor, Sequence[float]], Iterator[Tensor]]] = {
    "euler": euler,
    "heun": heun,
    "adams2": adams2,
}


def velocity_field(
    model: Model,
    labels: Tensor,
    *,
    guidance: float = 1.0,
    interval: tuple[float, float] | None = None,
    null_class: int | None = None,
    pair: Pair | None = None,
    predict: Prediction = "v",
    noise_scale: float = 1.0,
    t_eps: float = 0.05,
    path: EnergyPath | None = None,
) -> Field:
    """The velocity that a network gives for these labels, guided where guidance applies.

    model: (z [B,C,H,W], t [B], y [B]) -> [B,C,H,W], a prediction of `predict`. labels: int64 [B].
    guidance: w; 1 is no guidance. interval: (lo, hi), both strict; None is everywhere. Where guidance does not apply
    the model alone is evaluated.
    pair: like model, but -> (weaker prediction, prediction), for guidance; None compares with the null class.
    path: of training, None the linear one; it matters where x is predicted.
    Returns field(z [B,C,H,W], t) -> v [B,C,H,W]. Raises ValueError for guidance without pair and null class, an empty
    interval or an unknown prediction.
    """
    check_prediction(predict, "predict")
    if pair is None and guidance != 1:
        if null_class is None:
            raise InputError(f"guidance={guidance} compares with the null class: pass null_class, or guidance=1")
        pair = against_null_class(model, null_class)
    low, high = interval or (float("-inf"), float("inf"))
    if not low < high:
        raise InputError(f"guidance interval must be (low, high) with low < high, got ({low}, {high})")

    def velocity(prediction: Tensor, z: Tensor, times: Tensor) -> Tensor:
        if path is not None and predict == "x":
            return path.endpoint(prediction, times).velocity_at(z, t_eps)
        return convert(prediction, z, times, predict, "v", noise_scale, t_eps)

    def field(z: Tensor, t: float) -> Tensor:
        times = torch.full((z.shape[0],), t, dtype=z.dtype, device=z.device)
        if guidance == 1 or not low < t < high:
            return velocity(model(z, times, labels), z, times)
        u, c = (velocity(prediction, z, times) for prediction in pair(z, times, labels))
        return u + guidance * (c - u)

    return field


def against_null_class(model: Model, null_class: int) -> Pair:
    """Both predictions by one call that holds [null class, label] as 2B images."""

    def pair(z: Tensor, t: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.cat([torch.full_like(labels, null_class), labels])
        u, c = model(torch.cat([z, z]), torch.cat([t, t]), y).chunk(2)
        return u, c

    return pair


@torch.no_grad()
def sample(
    model: Model,
    numbers: Tensor,
    labels: Tensor,
    *,
    seed: int,
    shape: Sequence[int],
    steps: int = 50,
    solver: Solver = "heun",
    guidance: float = 1.0,
    interval: tuple[float, float] | None = None,
    shift: float = 1.0,
    end: float = 1.0,
    predict: Prediction = "v",
    noise_scale: float = 1.0,
    t_eps: float = 0.05,
    path: EnergyPath | None = None,
    null_class: int | None = None,
    pair: Pair | None = None,
    device: torch.device | str = "cpu",
    batch: int = 64,
    progress: bool = False,
) -> Tensor:
    """Draw images: the same (seed, number, label) gives the same image whatever the batch and whatever else is drawn.

    model: (z [B,C,H,W] float32, t [B] float32, y [B] int64) -> prediction [B,C,H,W] of `predict`, in eval mode.
    numbers: int64 [N], the samples' numbers. labels: int64 [N]. shape: of one image, (C, H, W).
    steps, solver, shift, end: see time_grid and SOLVERS. guidance, interval, null_class, pair: see velocity_field; an
    interval of (0, 1) leaves the very first evaluation, t = 0, unguided, because both ends are strict.
    noise_scale, t_eps, path: as in training. batch: images per network call (2 x batch under guidance).
    progress: show a bar.
    Returns float32 [N, C, H, W] on the device, pixels about [-1, 1] but not clipped: see to_uint8.
    Raises ValueError for an argument out of its range, before the network is called.
    """
    _check(model, numbers, labels, solver, batch)
    grid = time_grid(steps, shift, end)
    numbers, labels = numbers.to(device), labels.to(device)
    images = []
    with tqdm(total=steps * -(-len(numbers) // batch), desc="sample", unit="step", disable=not progress) as bar:
        for n, y in zip(numbers.split(batch), labels.split(batch), strict=True):
            field = velocity_field(
                model,
                y,
                guidance=guidance,
                interval=interval,
                null_class=null_class,
                pair=pair,
                predict=predict,
                noise_scale=noise_scale,
                t_eps=t_eps,
                path=path,
            )
            start = noise_scale * noise(seed, n, shape, philox.SAMPLING)
            for z in SOLVERS[solver](field, start, grid):
                image = z
                bar.update()
            images.append(image)
    return torch.cat(images)


def to_uint8(x: Tensor) -> Tensor:
    """Images in [-1, 1] as bytes: clip((x + 1) 127.5 + 0.5) to [0, 255], the inverse of x = byte / 127.5 - 1.

    x: [N, 3, H, W]. Returns uint8 [N, H, W, 3].
    """
    return rearrange(((x.float() + 1) * 127.5 + 0.5).clamp(0, 255).to(torch.uint8), "n c h w -> n h w c").contiguous()


def _check(model: Model, numbers: Tensor, labels: Tensor, solver: str, batch: int) -> None:
    if isinstance(model, torch.nn.Module) and model.training:
        raise ValueError("the model is in training mode, where dropout is active; call model.eval() before sampling")
    if numbers.ndim != 1 or not len(numbers) or numbers.shape != labels.shape:
        shapes = f"numbers {list(numbers.shape)}, labels {list(labels.shape)}"
        raise ValueError(f"sampling needs one number and one label per image, at least one image; got {shapes}")
    if solver not in SOLVERS:
        raise InputError(f"solver {solver!r} is unknown; use one of {', '.join(SOLVERS)}")
    if batch < 1:
        raise InputError(f"batch must be at least 1 image, got {batch}")
