"""The training objective: both ways through a model are the same function, with every operator body."""

import pytest
import torch
from golden_reference import relative
from torch import nn

from pixelgen_fast.config import Objective
from pixelgen_fast.engine.objective import FlowMatching
from pixelgen_fast.models import pixeldit

CONFIG = pixeldit.Config(hidden_size=24, num_heads=2, patch_depth=1, patch_size=4, pixel_hidden_size=8, pixel_depth=1)


class Opaque(nn.Module):
    """A model that offers its prediction only."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = model

    def forward(self, z: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.inner(z, t, y)


@pytest.mark.parametrize("body", ["reference", "triton"])
@pytest.mark.parametrize("post", [False, True])
@pytest.mark.parametrize("space", ["v", "x"])
def test_noising_inside_the_operators_is_the_same_objective(
    body: str, post: bool, space: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    config = pixeldit.Config(**(vars(CONFIG) | {"post_modulation": post}))
    model = pixeldit.build(config, 8, 3)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    objective = Objective(loss=space, noise_scale=1.5, time_shift=2.0, class_drop=0.5)
    images = torch.randint(0, 256, (3, 8, 8, 3), dtype=torch.uint8)
    batch = images, torch.tensor([0, 1, 2]), torch.tensor([7, 8, 2**33])

    monkeypatch.setenv("PIXELGEN_OPS", "reference")
    plain = FlowMatching(Opaque(model), objective, seed=11, null_class=3)(*batch)
    plain.backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()

    monkeypatch.setenv("PIXELGEN_OPS", body)
    fused = FlowMatching(model, objective, seed=11, null_class=3)(*batch)
    fused.backward()
    assert fused.item() == pytest.approx(plain.item(), rel=1e-5)
    for (name, p), gradient in zip(model.named_parameters(), expected, strict=True):
        assert relative(p.grad, gradient) < 1e-4, name
