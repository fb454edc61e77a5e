"""Sharded parameters, recomputed blocks and both together train as the plain model does."""

import copy

import pytest
import torch

from pixelgen_fast.config import Objective
from pixelgen_fast.engine import zero
from pixelgen_fast.engine.objective import FlowMatching
from pixelgen_fast.engine.optimizer import AdamWEMA
from pixelgen_fast.engine.parallel import wrap_blocks
from pixelgen_fast.models import pixeldit

CONFIG = pixeldit.Settings(
    hidden_size=24, num_heads=2, patch_depth=2, patch_size=4, pixel_hidden_size=8, pixel_depth=2, registers=3
)


def module() -> FlowMatching:
    torch.manual_seed(0)
    model = pixeldit.build(CONFIG, 16, 3)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return FlowMatching(model, Objective(), seed=5, null_class=3)


def trained(stage: int, recompute: str) -> dict[str, torch.Tensor]:
    zero.init_distributed("cpu")
    m = module()
    wrap_blocks(m.model.blocks(), recompute=recompute, compile_blocks=False)
    engine = zero.ZeroEngine(
        m,
        AdamWEMA(m.parameters(), lr=1e-2),
        stage=stage,
        micro_batch=4,
        whole_modules=m.model.whole_modules(),
        # every parameter is freed outside its module, as the large ones of a real model are
        overrides={"zero_optimization": {"stage3_param_persistence_threshold": 0}} if stage == 3 else None,
    )
    images = torch.randint(0, 256, (4, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    for step in range(3):
        engine.backward(engine(images, torch.arange(4) % 3, torch.arange(4) + 4 * step))
        engine.step()
    return engine.state_dict()


@pytest.fixture(scope="module")
def plain() -> dict[str, torch.Tensor]:
    """Three steps of torch alone."""
    m = module()
    optimizer = torch.optim.AdamW(m.parameters(), lr=1e-2, weight_decay=0.0)
    images = torch.randint(0, 256, (4, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    for step in range(3):
        optimizer.zero_grad()
        m(images, torch.arange(4) % 3, torch.arange(4) + 4 * step).backward()
        optimizer.step()
    return copy.deepcopy(dict(m.named_parameters()))


@pytest.mark.parametrize(
    ("stage", "recompute"), [(1, "blocks"), (1, "operators"), (2, "operators"), (3, "none"), (3, "blocks")]
)
def test_same_weights_as_plain_torch(plain: dict[str, torch.Tensor], stage: int, recompute: str) -> None:
    found = trained(stage, recompute)
    assert found.keys() == plain.keys()
    for name, value in plain.items():
        assert torch.allclose(found[name], value, rtol=1e-4, atol=1e-6), name


def test_stage_3_leaves_torch_as_it_was() -> None:
    """DeepSpeed can replace F.linear by one that changes its product in place, for all models of the process."""
    before = torch.nn.functional.linear
    trained(3, "none")
    assert torch.nn.functional.linear is before
