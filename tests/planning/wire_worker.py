"""What one rank of test_communication.py does: `python wire_worker.py FOLDER` writes what a step of each stage sends.

Every method of a process group that sends is wrapped, in whatever version of PyTorch: it notes its largest argument,
which is the tensor that is whole on every rank.
"""

import re
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pixelgen_fast.engine.optimizer import AdamWEMA
from pixelgen_fast.engine.zero import ZeroEngine, init_distributed

WIDTH = 96
SENDING = [name for name in dir(dist.ProcessGroup) if re.search("reduce|gather|broadcast|scatter|to_?all|send", name)]
# DeepSpeed's own thresholds; none kept whole; none kept whole or until backward
THRESHOLDS = {
    "own": {},
    "cut": {"stage3_param_persistence_threshold": 0},
    "again": {
        "stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0, "stage3_max_live_parameters": 1000,
        "stage3_prefetch_bucket_size": 0,
    },
}  # fmt: skip
sent: list[tuple[str, int]] = []


def tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [tensor for one in value for tensor in tensors(one)] if isinstance(value, list | tuple) else []


def size(value: Any) -> int:
    return sum(x.numel() * x.element_size() for x in tensors(value))


def wrap(name: str) -> None:
    original = getattr(dist.ProcessGroup, name)

    def noted(group: dist.ProcessGroup, *args: Any, **kwargs: Any) -> Any:
        sent.append((name, max(map(size, (*args, *kwargs.values())))))
        return original(group, *args, **kwargs)

    setattr(dist.ProcessGroup, name, noted)


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.Tanh(), nn.Linear(4 * WIDTH, WIDTH), nn.LayerNorm(WIDTH))


def last_step(stage: int, accumulation: int, thresholds: dict[str, int]) -> list[tuple[str, int]]:
    """(method, bytes) of each call in the third bf16 step: the first two trace stage 3's order of modules."""
    model = net()
    engine = ZeroEngine(
        model, AdamWEMA(model.parameters(), clip_norm=1.0), stage=stage, micro_batch=2, accumulation=accumulation,
        dtype="bf16", overrides={"zero_optimization": thresholds},
    )  # fmt: skip
    for _ in range(3):
        sent.clear()
        for _ in range(accumulation):
            engine.backward(engine(torch.randn(2, WIDTH, dtype=torch.bfloat16)).float().square().mean())
            engine.step()
    return list(sent)


def main() -> None:
    folder = Path(sys.argv[1])
    init_distributed("cpu")
    for name in SENDING:
        wrap(name)
    cases = [(stage, times, "own") for stage in (1, 2, 3) for times in (1, 2)]
    cases += [(3, times, name) for name in ("cut", "again") for times in (1, 2)]
    found = {case: last_step(*case[:2], THRESHOLDS[case[2]]) for case in cases}
    if dist.get_rank() == 0:
        torch.save(found, folder / f"{dist.get_world_size()}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
