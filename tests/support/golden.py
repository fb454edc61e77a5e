"""Reference numbers of published models and the weights that they were made with.

golden/<system>.npz holds x, t, y, w, output, loss = mean(output * w), grad_x, and as JSON the config, the state dict's
names and shapes, and the norm of every gradient. A weight is a function of its name: r = RandomState(crc32(name)),
a = r.standard_normal; matrices are a / sqrt(fan-in), vectors 1 + 0.1 a when named .weight and 0.1 a otherwise. JiT's
pos_embed is not random: it is the fixed table that MAE (arXiv 2111.06377) computes.
"""

import json
import zlib
from pathlib import Path

import numpy as np
import torch

FOLDER = Path(__file__).parents[1] / "golden"


class Golden:
    def __init__(self, system: str) -> None:
        arrays = np.load(FOLDER / f"{system}.npz")
        self.x, self.t, self.y, self.w = (torch.from_numpy(arrays[k]) for k in ("x", "t", "y", "w"))
        self.output, self.grad_x = torch.from_numpy(arrays["output"]), torch.from_numpy(arrays["grad_x"])
        self.loss = float(arrays["loss"])
        self.config, self.grad_norms = json.loads(str(arrays["config"])), json.loads(str(arrays["grad_norms"]))
        self.state = {name: weight(name, shape) for name, shape in json.loads(str(arrays["keys"])).items()}


def weight(name: str, shape: list[int]) -> torch.Tensor:
    if name == "pos_embed":
        return position_table(round(shape[1] ** 0.5), shape[2])
    random = np.random.RandomState(zlib.crc32(name.encode()))
    a = random.standard_normal(int(np.prod(shape))).astype(np.float32).reshape(shape)
    vector = len(shape) == 1
    a = 0.1 * a + name.endswith(".weight") if vector else a / np.sqrt(np.prod(shape[1:]))
    return torch.from_numpy(a.astype(np.float32))


def position_table(n: int, dim: int) -> torch.Tensor:
    """[1, n n, dim]: sines and cosines of the column, then those of the row, at dim / 4 frequencies each."""
    table = np.zeros((n, n, dim))
    for row, column, k in np.ndindex(n, n, dim // 4):
        omega = 10000.0 ** (-k / (dim / 4))
        for half, place in enumerate((column, row)):
            first = half * dim // 2 + k
            table[row, column, first], table[row, column, first + dim // 4] = (
                np.sin(place * omega),
                np.cos(place * omega),
            )
    return torch.from_numpy(table.reshape(1, n * n, dim).astype(np.float32))


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """||found - wanted|| / ||wanted|| in float64."""
    found, wanted = found.detach().double(), wanted.detach().double()
    return float((found - wanted).norm() / wanted.norm())
