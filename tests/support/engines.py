"""An engine for tests of checkpoints, without a model."""

import torch
from torch import Tensor

SHAPES = {"body.weight": (7, 5), "body.bias": (7,), "projector.weight": (3, 1)}
KINDS = ["master", "exp_avg", "exp_avg_sq", "ema_0.9", "ema_0.999"]


class Memory:
    """What `checkpoint` asks of an engine, held in a dict; made from a seed."""

    rank, world, host_group, stage = 0, 1, None, 1

    def __init__(self, seed: int, shapes: dict[str, tuple[int, ...]] | None = None) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.shapes = shapes or SHAPES
        self.state = {
            n: {k: torch.randn(s, generator=generator) for k in self.kinds(n)} for n, s in self.shapes.items()
        }
        self.buffer = {"shift": torch.randn(2, generator=generator)}
        self.counters = {"step": seed, "skipped": 1, "skipped_in_a_row": 0}

    def names(self) -> list[str]:
        return list(self.shapes)

    def kinds(self, name: str) -> list[str]:
        return KINDS[:3] if name.startswith("projector") else KINDS

    def gather(self, name: str, kinds: list[str] | None = None, to: int | None = None) -> dict[str, Tensor]:
        return {kind: self.state[name][kind].clone() for kind in kinds or self.kinds(name)}

    def restore(self, name: str, state: dict[str, Tensor]) -> None:
        self.state[name] = state

    def buffers(self) -> dict[str, Tensor]:
        return self.buffer

    def restore_buffers(self, buffers: dict[str, Tensor]) -> None:
        self.buffer = buffers

    def scalars(self) -> dict[str, int]:
        return self.counters

    def load_scalars(self, scalars: dict[str, int]) -> None:
        self.counters = scalars


def same(a: Memory, b: Memory) -> bool:
    tensors = all(torch.equal(a.state[n][k], b.state[n][k]) for n in a.state for k in a.state[n])
    return tensors and torch.equal(a.buffer["shift"], b.buffer["shift"]) and a.counters == b.counters
