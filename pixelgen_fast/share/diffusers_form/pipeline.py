"""Images of classes, from noise, with a network that predicts the flow from noise to data.

    z' = v(z, t),  t from 0 (noise) to 1 (data)         v = u + w (c - u) under guidance w, of no class u and a class c

The noise of sample n is Philox4x32-10 of (seed, n): the same seed and number give the same image on any device and in
any batch, here and in the program that this model was trained with. This file needs torch and diffusers, nothing else.
Shapes: N images in batches of B.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from PIL import Image
from torch import Tensor, nn

SAMPLING = 4  # the stream of Philox that samples begin from
MASK = 0xFFFFFFFF


class PixelPipeline(DiffusionPipeline):
    """pipe(["3", "7"], seed=0) draws one image of each class; see __call__.

    settings: {"classes": names, "objective": {...}, "sample": {...}}, what the model was trained and is drawn with.
    """

    model_cpu_offload_seq = "transformer"

    def __init__(self, transformer: nn.Module, settings: dict | None = None) -> None:
        super().__init__()
        self.register_modules(transformer=transformer)
        self.register_to_config(settings=settings)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | list[int | str],
        seed: int | None = None,
        first: int = 0,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        solver: str | None = None,
        interval: tuple[float, float] | None = None,
        shift: float | None = None,
        end: float | None = None,
        batch_size: int | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Draw an image for each label.

        class_labels: names or numbers of classes. seed, first: the noise is that of samples first, first + 1, ... of
        the seed. latents: standard normal noise [N, 3, S, S] to take instead. num_inference_steps, guidance_scale,
        solver (euler, heun, adams2), interval (times between which guidance acts), shift, end (time at which the flow
        is left), batch_size: None for those that the model came with.
        output_type: "pil", "np" (float32 [N, S, S, 3] in [0, 1]) or "pt" (float32 [N, 3, S, S], about [-1, 1]).
        Raises ValueError for a class, a solver or an output that there is not.
        """
        given = {
            "seed": seed, "steps": num_inference_steps, "guidance": guidance_scale, "solver": solver,
            "interval": interval, "shift": shift, "end": end, "batch": batch_size,
        }  # fmt: skip
        chosen = self.config.settings["sample"] | {name: value for name, value in given.items() if value is not None}
        if chosen["solver"] not in SOLVERS or output_type not in ("pil", "np", "pt"):
            raise ValueError(f"solver {chosen['solver']!r} is one of {', '.join(SOLVERS)}; output_type pil, np or pt")
        labels = self._numbers(class_labels).to(self.device)
        numbers = torch.arange(first, first + len(labels), device=self.device)
        size = self.transformer.config.image_size
        if latents is None:
            latents = normal(chosen["seed"], numbers, 3 * size * size).view(-1, 3, size, size)
        latents = latents.to(self.device, torch.float32)
        parts = zip(latents.split(chosen["batch"]), labels.split(chosen["batch"]), strict=True)
        images = torch.cat([self._draw(noise, y, chosen) for noise, y in parts])
        images = images if output_type == "pt" else to_arrays(images, output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _numbers(self, labels: int | str | list[int | str]) -> Tensor:
        names = self.config.settings["classes"]
        found = []
        for label in labels if isinstance(labels, list | tuple) else [labels]:
            if label not in (names if isinstance(label, str) else range(len(names))):
                there = f"{', '.join(names[:20])}{' ...' * (len(names) > 20)}"
                raise ValueError(f"class {label!r} is none; there are {there}")
            found.append(names.index(label) if isinstance(label, str) else label)
        return torch.tensor(found)

    def _draw(self, noise: Tensor, labels: Tensor, chosen: dict) -> Tensor:
        """Images float32 [B, 3, S, S] of noise of that shape and labels [B]."""
        objective, null = self.config.settings["objective"], len(self.config.settings["classes"])
        low, high = chosen["interval"] or (-math.inf, math.inf)
        weight, dtype = chosen["guidance"], self.transformer.dtype

        def velocity(z: Tensor, t: Tensor, y: Tensor) -> Tensor:
            return as_velocity(self.transformer(z.to(dtype), t, y), z, t, **objective)

        def field(z: Tensor, t: float) -> Tensor:
            times = torch.full((len(z),), t, dtype=z.dtype, device=z.device)
            if weight == 1 or not low < t < high:
                return velocity(z, times, labels)
            y = torch.cat([torch.full_like(labels, null), labels])
            u, c = velocity(torch.cat([z, z]), torch.cat([times, times]), y).chunk(2)
            return u + weight * (c - u)

        steps, shift = chosen["steps"], chosen["shift"]
        even = [chosen["end"] * (i / steps) for i in range(steps + 1)]
        z = objective["noise_scale"] * noise
        grid = [t / (t + (1 - t) * shift) for t in even]
        for image in self.progress_bar(SOLVERS[chosen["solver"]](field, z, grid), total=steps):
            z = image
        return z

    def progress_bar(self, iterable: Iterator[Tensor], total: int) -> Iterator[Tensor]:
        """The iterable behind diffusers' bar, with its number of steps."""
        with super().progress_bar(total=total) as bar:
            for item in iterable:
                yield item
                bar.update()


def as_velocity(p: Tensor, z: Tensor, t: Tensor, *, predict: str, noise_scale: float, t_eps: float) -> Tensor:
    """v = x - s e of a prediction of v, x or e at z = t x + (1-t) s e; divisors are held at t_eps or above."""
    p, z, t = p.float(), z.float(), t[:, None, None, None]
    if predict == "x":
        return (p - z) / (1 - t).clamp(min=t_eps)
    return p if predict == "v" else (z - noise_scale * p) / t.clamp(min=t_eps)


def euler(field: Callable[[Tensor, float], Tensor], z: Tensor, grid: list[float]) -> Iterator[Tensor]:
    for t, t_next in itertools.pairwise(grid):
        z = z + (t_next - t) * field(z, t)
        yield z


def heun(field: Callable[[Tensor, float], Tensor], z: Tensor, grid: list[float]) -> Iterator[Tensor]:
    """The last step is Euler's."""
    for t, t_next in itertools.pairwise(grid[:-1]):
        h, v = t_next - t, field(z, t)
        z = z + h * 0.5 * (v + field(z + h * v, t_next))
        yield z
    yield from euler(field, z, grid[-2:])


def adams2(field: Callable[[Tensor, float], Tensor], z: Tensor, grid: list[float]) -> Iterator[Tensor]:
    """Two-step Adams-Bashforth with the coefficients of even steps; the first step is Euler's."""
    before = None
    for t, t_next in itertools.pairwise(grid):
        v = field(z, t)
        z = z + (t_next - t) * (v if before is None else 1.5 * v - 0.5 * before)
        before = v
        yield z


SOLVERS = {"euler": euler, "heun": heun, "adams2": adams2}


def normal(seed: int, numbers: Tensor, count: int) -> Tensor:
    """Standard normal float32 [N, count] of each sample, by Philox4x32-10 and Box-Muller."""
    u = ((words(seed, numbers, count + count % 2) >> 9).to(torch.float32) + 0.5) * 2.0**-23
    radius, angle = torch.sqrt(-2.0 * torch.log(u[:, 0::2])), (2.0 * math.pi) * u[:, 1::2]
    return torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], dim=-1).flatten(1)[:, :count]


def words(seed: int, numbers: Tensor, count: int) -> Tensor:
    """32-bit words int64 [N, count], counted by (element // 4, number low, number high, stream)."""
    k0, k1 = seed & MASK, (seed >> 32) & MASK
    c0 = torch.arange((count + 3) // 4, device=numbers.device)[None].expand(len(numbers), -1)
    c1, c2 = (numbers & MASK)[:, None].expand_as(c0), ((numbers >> 32) & MASK)[:, None].expand_as(c0)
    c3 = torch.full_like(c0, SAMPLING)
    for _ in range(10):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = ((b >> 32) & MASK) ^ c1 ^ k0, b & MASK, ((a >> 32) & MASK) ^ c3 ^ k1, a & MASK
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return torch.stack([c0, c1, c2, c3], dim=-1).flatten(1)[:, :count]


def to_arrays(x: Tensor, kind: str) -> list[Image.Image] | np.ndarray:
    """Images of [-1, 1]: rounded to bytes for PIL, else float32 [N, S, S, 3] in [0, 1]."""
    x = x.float().permute(0, 2, 3, 1).cpu()
    if kind == "np":
        return ((x + 1) / 2).clamp(0, 1).numpy()
    return [Image.fromarray(image) for image in ((x + 1) * 127.5 + 0.5).clamp(0, 255).to(torch.uint8).numpy()]
