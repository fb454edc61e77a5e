"""Work is counted by the formulas, bytes as tensors are, and hooks leave nothing behind."""

import torch
from torch import Tensor, nn

from pixelgen_fast.engine.parts import LOSS
from pixelgen_fast.profiling.regions import Regions, counting, weights_by_part


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp, self.unused = nn.Linear(8, 8, bias=False), nn.Linear(8, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(x)


class Objective(nn.Module):
    """A model of one product, then a stack of two blocks, and a mean."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.enter = nn.Linear(4, 8, bias=False)
        self.model.blocks = nn.ModuleList([Block(), Block()])
        self.model.forward = self._model

    def _model(self, x: Tensor) -> Tensor:
        x = self.model.enter(x)
        for block in self.model.blocks:
            x = block(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).square().mean()


def test_regions_are_the_named_parts_of_the_model() -> None:
    assert Regions(Objective()).parts == {
        "objective": LOSS,
        "model": "model",
        "model.enter": "enter",
        "model.blocks.0": "blocks",
        "model.blocks.0.mlp": "blocks.mlp",
        "model.blocks.0.unused": "blocks.unused",
        "model.blocks.1": "blocks",
        "model.blocks.1.mlp": "blocks.mlp",
        "model.blocks.1.unused": "blocks.unused",
    }


def test_flops_bytes_and_what_is_kept_for_backward() -> None:
    objective, x = Objective(), torch.randn(16, 4)
    regions = Regions(objective)
    with regions, counting(regions, dict(objective.named_parameters())) as counted:
        objective(x).backward()
    forward = counted.work["aten::mm", ((16, 4), (4, 8))]
    assert (forward.calls, forward.flops) == (1, 2 * 16 * 4 * 8)
    assert forward.nbytes == 4 * (16 * 4 + 4 * 8 + 16 * 8)
    products = [work for (name, _), work in counted.work.items() if name == "aten::mm"]
    # of the first product no gradient of its input; of the other two both
    assert sum(work.flops for work in products) == 2 * 16 * 4 * 8 * 2 + 2 * 16 * 8 * 8 * 3 * 2
    assert counted.work["aten::t", ((8, 4),)].nbytes == 0
    # each product keeps its input, the square its own; the weights are there anyway
    assert counted.saved == {"enter": 4 * 16 * 4, "blocks.mlp": 2 * 4 * 16 * 8, LOSS: 4 * 16 * 8}


def test_weights_count_for_the_part_that_reads_them() -> None:
    found = weights_by_part(Objective(), {"enter", "blocks", "blocks.mlp"})
    assert found == {"enter": 4 * 32, "blocks.mlp": 2 * 4 * 64, "blocks": 2 * 4 * 16}


def test_no_hook_stays() -> None:
    objective = Objective()
    with Regions(objective) as regions:
        objective(torch.randn(2, 4))
        assert not regions.stack
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in objective.modules())
