"""Forward and backward of a micro-batch as two CUDA graphs: the host starts two graphs instead of hundreds of kernels.

    capture(module, ...)     module.forward then copies its inputs to fixed places and replays

A small model on a fast GPU waits for the host (benchmarks/host.py); a graph takes the host out. Noising and loss are
inside, clipping, optimizer and ZeRO outside. What is captured repeats with the same kernels on the same memory, so the
step may depend on the host in no way: no random state, no clock, no number read back (tests/engine/test_graph.py).
On an H200, graphs of five models trained like the step as it is, bit for bit (`python -m pytest -m gpu
tests/engine/test_graph.py`); inside a run, with DeepSpeed's hooks, no GPU has run one yet.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from pixelgen_fast.config import Config, ConfigError
from pixelgen_fast.engine.objective import TrainingObjective

WARM_UP = 3  # passes before the capture, in which libraries and kernels settle


def check_graph(config: Config, device: torch.device, world: int, accumulation: int, module: TrainingObjective) -> None:
    """Refuse what cannot be captured. Raises ConfigError with the reason; nothing where train.cuda_graph is off."""
    if not config.train.cuda_graph:
        return
    t, reason = config.train, ""
    if device.type != "cuda":
        reason = f"the run is on {device.type}; a graph is recorded by a GPU: use run.device=cuda, or turn it off"
    elif world > 1:
        reason = f"there are {world} ranks, whose communication starts inside the backward pass; use one rank"
    elif t.zero_stage != 1:
        reason = f"train.zero_stage is {t.zero_stage}, whose hooks move gradients inside the backward pass; use stage 1"
    elif accumulation > 1:
        reason = (
            f"a step has {accumulation} micro-batches, and a graph writes each one's gradients to the same place; set "
            f"train.micro_batch={t.global_batch}"
        )
    elif t.recompute != "none":
        reason = f"train.recompute is {t.recompute}, which saves the state of random numbers; use train.recompute=none"
    elif module.alignment is not None:
        reason = "the teacher of alignment.teacher is timed inside the step; use alignment.teacher=null"
    elif module.draws:
        reason = "the model draws dropout from the generator's state; set its dropout to 0"
    elif not module.model.fixed_shapes:
        reason = (
            "how much of an image the model hides, and so the shapes of a step, are drawn anew in each; turn it off"
        )
    if reason:
        raise ConfigError(f"train.cuda_graph is on, but {reason}")


def capture(module: TrainingObjective, micro_batch: int, image_size: int, device: torch.device) -> None:
    """Record the module's forward and backward on the GPU, and replay them from now on.

    To be called once its parameters are where they will stay, after ZeRO has taken them. The gradients of parameters
    must be None at each backward pass. Hooks of the module, such as DeepSpeed's, run around the graphs, not in them.
    """
    shape = (micro_batch, image_size, image_size, 3)
    images = torch.zeros(shape, dtype=torch.uint8, device=device)
    labels, numbers = (torch.zeros(micro_batch, dtype=torch.int64, device=device) for _ in range(2))
    with _without_hooks(module):
        torch.cuda.make_graphed_callables(
            module, (images, labels, numbers), num_warmup_iters=WARM_UP, allow_unused_input=True
        )


@contextmanager
def _without_hooks(module: nn.Module) -> Iterator[None]:
    """torch captures no module that has hooks; the order in which they run stays."""
    tables = [module._backward_hooks, module._forward_hooks, module._forward_pre_hooks]
    kept = [dict(table) for table in tables]
    for table in tables:
        table.clear()
    try:
        yield
    finally:
        for table, hooks in zip(tables, kept, strict=True):
            table.update(hooks)
