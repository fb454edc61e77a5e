"""Which kernels Triton is asked for, by its own key: `python warm_worker.py FOLDER` writes FOLDER/keys.json.

    warmed   by warm-up of step_launches(config)              started   by a step of the Trainer itself, on CPU tensors

Both go through Triton's launcher for a GPU that is not there: its driver is replaced, and Triton's cache hook takes
down each key and tells Triton not to compile, so that nothing is compiled or run. What kernels would write is zero.
"""

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
from pixelgen_kernels import bodies
from pixelgen_kernels.report.warmup import warm
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from pixelgen_fast import config as cfg
from pixelgen_fast import models
from pixelgen_fast.data import Batch
from pixelgen_fast.engine.launches import step_launches

HERE = Path(__file__).parent
STAGE_2, STAGE_3 = ["train.zero_stage=2"], ["train.zero_stage=3", "model.num_heads=3"]
found: set[str] = set()


def replace_gpu() -> None:
    driver.set_active(
        SimpleNamespace(
            get_current_device=lambda: 0,
            get_current_stream=lambda device: 0,
            get_current_target=lambda: GPUTarget("cuda", 90, 32),
        )
    )

    def take_down(*, key: str, fn: object, **_: object) -> bool:
        found.add(f"{fn.name} {key}")
        return True

    knobs.runtime.jit_cache_hook = take_down
    bodies.INTERPRETED = True  # CPU tensors may have kernels


def zero_results() -> None:
    def zeroed(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        return lambda *args, **kwargs: torch.no_grad()(torch.Tensor.zero_)(allocate(*args, **kwargs))

    # torch.device as a context remembers torch's constructors at its first use; it must not remember these
    with torch.device("cpu"):
        torch.empty(0)
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        setattr(owner, name, zeroed(getattr(owner, name)))


def systems() -> ModuleType:
    """test_systems.py, for its configurations."""
    spec = importlib.util.spec_from_file_location("test_systems", HERE / "test_systems.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def warmed(config: cfg.Config, precision: str) -> set[str]:
    found.clear()
    count = warm(step_launches(config, precision, multiprocessors=2))
    assert len(found) == count, "Triton tells other launches apart than the list does"
    return set(found)


def started(config: cfg.Config, precision: str) -> set[str]:
    # launches do not depend on what is in the images, so that DALI need not be there
    sys.modules["pixelgen_fast.data.dali"] = SimpleNamespace(Loader=lambda *args, **settings: None)
    from pixelgen_fast.engine import assemble
    from pixelgen_fast.engine.step import training_step
    from pixelgen_fast.engine.trainer import Trainer

    assemble.resolve_device = lambda config: (torch.device("cpu"), precision)
    run = Trainer(config)
    found.clear()
    size, batch = config.data.image_size, config.train.micro_batch
    images = torch.zeros(batch, size, size, 3, dtype=torch.uint8)
    batches = [Batch(images, *(torch.zeros(batch, dtype=torch.int64) for _ in range(2)))] * run.order.accumulation
    training_step(run.engine, run.parts.objective, batches, [0] * len(batches))
    return set(found)


def main(folder: Path) -> None:
    replace_gpu()
    small = systems()
    teacher = small.write_sources(folder / "teacher")
    runs = [(variant, "bf16", []) for variant in small.VARIANTS]
    runs += [
        ("pixeldit", "fp32", []),
        ("jit", "fp32", ["train.zero_stage=2"]),
        ("repa", "bf16", ["train.zero_stage=3", "model.num_heads=3"]),
    ]
    runs += [("pixeldit", "fp32", []), ("jit", "fp32", STAGE_2), ("repa", "bf16", STAGE_3)]
    runs += [("pixeldit", "bf16", [f"train.recompute={kind}"]) for kind in ("operators", "blocks")]
    zero_results()
    keys = {}
    for number, (variant, precision, overrides) in enumerate(runs):
        path = small.write_config(folder / f"{number}.yaml", variant, teacher)
        config = cfg.load(path, [*overrides, f"run.dir={folder / str(number)}"], models.model_schema)
        name = " ".join([variant, precision, *overrides])
        keys[name] = {of.__name__: sorted(of(config, precision)) for of in (warmed, started)}
    (folder / "keys.json").write_text(json.dumps(keys))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
