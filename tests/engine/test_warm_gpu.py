"""On a GPU: a training step after warm-up compiles nothing, counted where Triton is about to compile."""

from pathlib import Path

import pytest
import torch
from pixelgen_kernels.report.warmup import warm
from triton import knobs

from pixelgen_fast import config as cfg
from pixelgen_fast import models
from pixelgen_fast.engine.launches import step_launches
from pixelgen_fast.engine.objective import FlowMatching
from pixelgen_fast.engine.optimizer import AdamWEMA
from pixelgen_fast.engine.parallel import wrap_blocks

CONFIGS = Path(__file__).parents[2] / "configs"
BATCH = 4
# shipped configurations with fewer blocks
RUNS = {
    "pixeldit_b_256": ("model.patch_depth=2", "model.pixel_depth=1"),
    "jit_b_256": ("model.depth=6",),
    "deco_l_256": ("model.patch_depth=2", "alignment.teacher=null"),
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", RUNS)
def test_a_step_after_warm_up_compiles_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = (f"train.micro_batch={BATCH}", *RUNS[name])
    config = cfg.load(CONFIGS / f"{name}.yaml", settings, models.model_schema)
    processors = torch.cuda.get_device_properties().multi_processor_count
    assert warm(step_launches(config, "bf16", multiprocessors=processors)) > 10

    compiled: list[str] = []
    monkeypatch.setattr(knobs.runtime, "jit_cache_hook", lambda *, repr, **_: compiled.append(repr))
    model = models.build_model(config, 1000)
    wrap_blocks(model.blocks(), recompute="none", compile_blocks=False)
    module = FlowMatching(model, config.objective, config.run.seed, 1000).to("cuda", torch.bfloat16)
    images = torch.zeros(BATCH, 256, 256, 3, dtype=torch.uint8, device="cuda")
    labels, numbers = (torch.arange(BATCH, device="cuda") for _ in range(2))
    module(images, labels, numbers).backward()
    shard = torch.nn.Parameter(torch.zeros(1001, device="cuda"))  # a flat one, as ZeRO hands it to the optimizer
    shard.grad = torch.ones_like(shard)
    AdamWEMA([shard], ema_decays=config.optimizer.ema, clip_norm=1.0).step()
    torch.cuda.synchronize()
    assert not compiled
