"""From noise to images: time grid, solvers of dz/dt = v(z, t), classifier-free guidance, and the sampler.

    grid      t_i = shift_time(i / N, shift), i = 0..N
    euler     z += h v(z, t)
    heun      z += h (v(z, t) + v(z + h v(z, t), t + h)) / 2, the last step Euler (JiT); 2N - 1 evaluations
    adams2    z += h (3 v_i - v_{i-1}) / 2, the first step Euler: two-step Adams-Bashforth with these coefficients on a
              shifted grid too, which is PixelDiT's "FlowDPMSolver"; N evaluations
    guidance  v = u + w (c - u) for lo < t < hi, else c (Ho & Salimans, arXiv 2207.12598; interval: Kynkäänniemi et al.,
              arXiv 2404.07724); c and u are the velocities with the label and with the null class

The start of sample n is a function of (seed, n), so a sample does not depend on what shares its batch.

Shapes: N samples in batches of B; z, v [B, 3, H, W]; t a Python number, shared by the batch.
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


def time_grid(steps: int, shift: float = 1.0) -> list[float]:
    """Times of a run of `steps` steps: steps + 1 numbers from exactly 0 to exactly 1."""
    if steps < 1:
        raise InputError(f"sampling needs at least 1 step, got {steps}")
    return [shift_time(i / steps, shift) for i in range(steps + 1)]


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
    predict: Prediction = "v",
    noise_scale: float = 1.0,
    t_eps: float = 0.05,
    path: EnergyPath | None = None,
) -> Field:
    """The velocity that a network gives for these labels, guided where guidance applies.

    model: (z [B,3,H,W], t [B], y [B]) -> [B,3,H,W], a prediction of `predict`. labels: int64 [B].
    guidance: w; 1 is no guidance. interval: (lo, hi), both strict; None is everywhere. Where guidance does not apply
    the unconditional network is not evaluated; where it does, one call holds [null class, label] as 2B images.
    path: of training, None the linear one; it matters where x is predicted.
    Returns field(z [B,3,H,W], t) -> v [B,3,H,W]. Raises ValueError for guidance without a null class, an empty interval
    or an unknown prediction.
    """
    check_prediction(predict, "predict")
    if guidance != 1 and null_class is None:
        raise InputError(f"guidance={guidance} compares with the null class: pass null_class, or guidance=1")
    low, high = interval or (float("-inf"), float("inf"))
    if not low < high:
        raise InputError(f"guidance interval must be (low, high) with low < high, got ({low}, {high})")

    def velocity(z: Tensor, t: float, y: Tensor) -> Tensor:
        times = torch.full((z.shape[0],), t, dtype=z.dtype, device=z.device)
        prediction = model(z, times, y)
        if path is not None and predict == "x":
            return path.endpoint(prediction, times).velocity_at(z, t_eps)
        return convert(prediction, z, times, predict, "v", noise_scale, t_eps)

    def field(z: Tensor, t: float) -> Tensor:
        if guidance == 1 or not low < t < high:
            return velocity(z, t, labels)
        u, c = velocity(torch.cat([z, z]), t, torch.cat([torch.full_like(labels, null_class), labels])).chunk(2)
        return u + guidance * (c - u)

    return field


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
    predict: Prediction = "v",
    noise_scale: float = 1.0,
    t_eps: float = 0.05,
    path: EnergyPath | None = None,
    null_class: int | None = None,
    device: torch.device | str = "cpu",
    batch: int = 64,
    progress: bool = False,
) -> Tensor:
    """Draw images: the same (seed, number, label) gives the same image whatever the batch and whatever else is drawn.

    model: (z [B,3,H,W] float32, t [B] float32, y [B] int64) -> prediction [B,3,H,W] of `predict`, in eval mode.
    numbers: int64 [N], the samples' numbers. labels: int64 [N]. shape: of one image, (3, H, W).
    steps, solver, shift: see time_grid and SOLVERS. guidance, interval, null_class: see velocity_field; an interval of
    (0, 1) leaves the very first evaluation, t = 0, unguided, because both ends are strict.
    noise_scale, t_eps, path: as in training. batch: images per network call (2 x batch under guidance).
    progress: show a bar.
    Returns float32 [N, 3, H, W] on the device, about [-1, 1] but not clipped: see to_uint8.
    Raises ValueError for an argument out of its range, before the network is called.
    """
    _check(model, numbers, labels, solver, batch)
    grid = time_grid(steps, shift)
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
