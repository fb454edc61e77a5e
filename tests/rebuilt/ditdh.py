"""DiT-DH and RAEv2's generator: outputs, loss and every gradient, in the public convention, where t = 0 is data; and
RAE's sampler with its training times."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from rebuilt import Comparison, GoldenFile
from torch import Tensor

from pixelgen_fast import interop
from pixelgen_fast.diffusion.solver import euler, time_grid
from pixelgen_fast.diffusion.time import shift_time, truncated_logit_normal

TOY = "tanh(x+a)*(1+t)-0.5*x"
FROM_DATA = 0.001


def rotary_tables(file: GoldenFile) -> dict[str, Tensor]:
    """The rotary tables in a file's state dict: a row of n x n whole positions each, and of tokens that are not turned.

    The first half of a head turns with the row, the last with the column, at 10^4^(-2k / (d / 2)) for pair k of a half.
    """
    n, tables = file.config["input_size"], {}
    for name in [name for name in file.keys if "freqs" in name]:
        length, d = file.keys[name]
        angle = np.zeros((length, d))
        for token, j in np.ndindex(n * n, d):
            place = token // n if j < d // 2 else token % n
            angle[token, j] = place * 10000.0 ** (-2 * (j % (d // 2) // 2) / (d // 2))
        table = np.cos(angle) if name.endswith("cos") else np.sin(angle)
        tables[name] = torch.from_numpy(table.astype(np.float32))
    return tables


def rebuild(file: GoldenFile) -> Iterator[Comparison]:
    outputs = [name for name in ("output", "output_base") if name in file.arrays]
    public = {key: value for key, value in file.config.items() if key not in ("fixed", "convention")}
    system = public["system"].removeprefix("rae_").removesuffix("_ditdh")
    module = interop.from_reference(system, public, file.state() | rotary_tables(file))
    x = file["x"].clone().requires_grad_()
    found = module(x, file["t"], file["y"])
    found = dict(zip(outputs, found if isinstance(found, tuple) else (found,), strict=True))
    loss = sum((found[name] * file[name.replace("output", "w")]).mean() for name in outputs)
    loss.backward()
    for name in outputs:
        yield name, found[name], file[name]
    yield "loss", loss, file["loss"]
    yield "grad_x", x.grad, file["grad_x"]
    yield from file.gradients(dict(module.named_parameters()))


def rebuild_sampler(file: GoldenFile) -> Iterator[Comparison]:
    """In public t falls from 1, noise, and velocities point there."""
    shift, points, a = file.config["shift"], file.config["num_points"], file["a"]
    if file.config["toy_velocity"] != TOY:
        raise ValueError(f"{file.path}: toy_velocity is {file.config['toy_velocity']!r}; known: {TOY!r}")
    grid, asked = time_grid(points - 1, shift, end=1 - FROM_DATA), []

    def field(z: Tensor, t: float) -> Tensor:
        asked.append(1 - t)
        return -(torch.tanh(z + a) * (2 - t) - 0.5 * z)

    *_, sample = euler(field, file["z"], grid)
    yield "grid", 1 - torch.tensor(grid, dtype=torch.float64), file["grid"]
    yield "t_evaluated", torch.tensor(asked, dtype=torch.float64), file["t_evaluated"]
    yield "sample", sample, file["sample"]
    t = truncated_logit_normal(1 - file["u"].double(), FROM_DATA)
    yield "t_train", 1 - shift_time(t, shift), file["t_train"]


SYSTEMS = {"rae_ditdh": rebuild, "raev2_ditdh": rebuild, "rae_sampler": rebuild_sampler}
