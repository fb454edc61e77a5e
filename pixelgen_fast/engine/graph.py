"""Forward and backward of a micro-batch as two CUDA graphs: the host starts two graphs instead of hundreds of kernels.

    capture(module, ...)     module.forward then copies its inputs to fixed places and replays

A small model on a fast GPU waits for the host (benchmarks/host.py); a graph takes the host out. Noising and loss are
inside, clipping, optimizer and ZeRO outside. What is captured repeats with the same kernels on the same memory, so the
step may depend on the host in no way: no random state, no clock, no number read back (tests/engine/test_graph.py).
`python -m pytest -m gpu tests/engine/test_graph.py` compares it with the step as it is, bit for bit.
"""

from __future__ import annotations

import torch

from pixelgen_fast.config import Config, ConfigError
from pixelgen_fast.engine.objective import FlowMatching

WARM_UP = 3  # passes before the capture, in which libraries and kernels settle


def is_captured(config: Config, device: torch.device, world: int, accumulation: int, module: FlowMatching) -> bool:
    """Whether a run captures its step: train.cuda_graph, or where that is None whether it can be captured.

    Raises ConfigError with the reason where train.cuda_graph asks for what cannot be.
    """
    wanted = config.train.cuda_graph
    reason = "" if wanted is False else _obstacle(config, device, world, accumulation, module)
    if wanted and reason:
        raise ConfigError(f"train.cuda_graph is on, but {reason}")
    return bool(wanted) or (wanted is None and not reason and not config.train.compile_blocks)


def _obstacle(config: Config, device: torch.device, world: int, accumulation: int, module: FlowMatching) -> str:
    """Why a step cannot be captured, and what to do about it; empty where it can be."""
    t = config.train
    if device.type != "cuda":
        return f"the run is on {device.type}; a graph is recorded by a GPU: use run.device=cuda, or turn it off"
    if world > 1:
        return f"there are {world} ranks, whose communication starts inside the backward pass; use one rank"
    if t.zero_stage != 1:
        return f"train.zero_stage is {t.zero_stage}, whose hooks move gradients inside the backward pass; use stage 1"
    if accumulation > 1:
        return (
            f"a step has {accumulation} micro-batches, and a graph writes each one's gradients to the same place; set "
            f"train.micro_batch={t.global_batch}"
        )
    if t.recompute != "none":
        return f"train.recompute is {t.recompute}, which saves the state of random numbers; use train.recompute=none"
    if module.alignment is not None:
        return "the teacher of alignment.teacher is timed inside the step; use alignment.teacher=null"
    return "the model draws dropout from the generator's state; set its dropout to 0" if module.draws else ""


def capture(module: FlowMatching, micro_batch: int, image_size: int, device: torch.device) -> None:
    """Record the module's forward and backward on the GPU, and replay them from now on.

    To be called once its parameters are where they will stay, after ZeRO has taken them. The gradients of parameters
    must be None at each backward pass.
    """
    shape = (micro_batch, image_size, image_size, 3)
    images = torch.zeros(shape, dtype=torch.uint8, device=device)
    labels, numbers = (torch.zeros(micro_batch, dtype=torch.int64, device=device) for _ in range(2))
    torch.cuda.make_graphed_callables(
        module, (images, labels, numbers), num_warmup_iters=WARM_UP, allow_unused_input=True
    )
