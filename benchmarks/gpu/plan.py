"""What a visit measures, in which order, and how long each may take; and the same path for a rehearsal on a CPU.

Seconds of the parts are shares of nine minutes, a visit's default limit. Limits of single tasks are for what hangs.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from gpu.visit import Part, Task

XL, L, B = (f"pixeldit_{size}_256" for size in ("xl", "l", "b"))
NAMED = ("XL", "B", "L", "JiT-H")
# most time in a step first
OPERATORS = (
    "pixel_mlp", "norm_modulate", "pixel_modulate", "qk_norm_rope", "swiglu", "flow_loss", "noised_patch_projection",
    "adamw_ema", "pixel_attention", "attention", "swiglu_linear", "random_words",
)  # fmt: skip
TUNED = (
    "norm_modulate", "pixel_mlp", "pixel_modulate", "swiglu", "qk_norm_rope", "noised_patch_projection", "flow_loss",
    "adamw_ema", "random_words",
)  # fmt: skip
GRAPH, OPERATORS_AGAIN, BLOCKS_AGAIN = "train.cuda_graph=true", "train.recompute=operators", "train.recompute=blocks"
# csrc is not compiled on the machine, and some tests watch the interpreter
KERNEL_TESTS = [
    "tests/kernels", "-k", "not native",
    *(f"--ignore=tests/kernels/{name}.py" for name in ("test_native", "test_step_launches")),
]  # fmt: skip
ENGINE_TESTS = ("tests/engine/test_graph.py", "tests/engine/test_warm_gpu.py")
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
INTERPRETER = {"TRITON_INTERPRET": "1"} | ONE_THREAD
# a model of two blocks on images of four patches
TINY = (
    "model.hidden_size=32", "model.num_heads=2", "model.patch_depth=1", "model.patch_size=4", "model.pixel_depth=1",
    "model.pixel_hidden_size=8", "data.image_size=8", "data.num_classes=10",
)  # fmt: skip


def parts(rehearsal: bool) -> list[Part]:
    return _rehearsal() if rehearsal else _visit()


def step(
    config: str,
    images: int,
    side: str,
    *overrides: str,
    module: str = "gpu.steps",
    attention: str = "sdpa",
    **arguments: Any,
) -> Task:
    """A task on a training step. attention: the backend; PyTorch's own, so that sides differ in nothing else."""
    named = [text.split(".")[-1] for text in overrides if text not in TINY] + [attention] * (attention != "sdpa")
    arguments |= {"config": config, "images": images, "side": side, "overrides": list(overrides)}
    limit = {"compiled": 120.0}.get(side, 75.0)
    return Task(
        " ".join([config, side, str(images), *named]), module, arguments, limit, {"PIXELGEN_ATTENTION": attention}
    )


def _visit() -> list[Part]:
    ceilings = {"models": ["B", "L", "XL"], "images": 64, "copied": 1 << 30, "square": 8192, "rounds": 15}
    operators = ["--batch=64", "--rounds=30"]
    loader = ["--images=512", "--batch=64", "--batches=20", "--repeats=2", "--threads=8", "--workers=4"]
    tests = [
        Task("kernels", "gpu.kernel_tests", {"select": KERNEL_TESTS, "workers": 12, "expected": 400}, 110),
        Task("engine", "gpu.kernel_tests", {"select": ["-m", "gpu", *ENGINE_TESTS], "workers": 0, "expected": 2}, 60),
    ]
    steps = [
        step(XL, 64, "ours"),
        step(XL, 32, "ours"),
        step(XL, 32, "reference"),
        step(B, 64, "ours"),
        step(B, 64, "reference"),
        step(XL, 64, "compiled"),
        step(XL, 64, "reference"),  # keeps 63 GB of activations: it may not fit
        step(L, 64, "ours"),
        step(L, 32, "ours"),
        step(L, 32, "reference"),
        step(B, 64, "compiled"),
        step(L, 64, "compiled"),
    ]
    variants = [
        *(step(config, 32, side) for config in ("jit_b_256", "deco_l_256") for side in ("ours", "reference")),
        step(B, 64, "ours", GRAPH),
        step(XL, 64, "ours", GRAPH),
        step(XL, 64, "ours", OPERATORS_AGAIN),
        step(XL, 64, "ours", attention="xformers"),
        step(XL, 64, "ours", attention="flash"),
        step(XL, 64, "ours", "model.pixel_attention_save=recompute"),
        step(B, 256, "ours"),
        step(XL, 64, "ours", BLOCKS_AGAIN),
        step(XL, 128, "ours"),
        step(XL, 16, "ours"),
        step(B, 32, "ours"),
    ]
    half = ["train.images=64000", "save.every_images=32000", "sample.grid_every_images=0"]
    product = {"config": "digits", "images": 64, "overrides": half}
    drawing = {"images": 64, "steps": 10, "guidance": 3.25, "bodies": ["triton", "reference"], "rounds": 2}
    return [
        Part("ceilings", 25, (Task("products", "gpu.ceilings", ceilings),)),
        Part("tests", 80, tuple(tests)),
        Part("step", 135, tuple(steps)),
        Part(
            "profile", 30,
            (
                step(XL, 64, "ours", module="gpu.profiled"),
                step(B, 64, "ours", module="gpu.profiled"),
                step(XL, 32, "reference", module="gpu.profiled"),
            ),
        ),
        Part("product", 45, (Task("digits", "gpu.main_job", product, 120),)),
        Part("variants", 45, tuple(variants)),
        Part(
            "operators", 60,
            tuple(
                Task(name, "gpu.operators_compared", {"operator": name, "model": "XL", "arguments": operators}, 75)
                for name in OPERATORS
            ),
        ),
        Part("counters", 25, (Task("XL", "gpu.counters", {"model": "XL", "images": 64}, 90),)),
        Part(
            "tuning", 50,
            tuple(
                Task(name, "gpu.tune", {"operator": name, "models": ["XL", "L", "B"], "images": 64, "rounds": 15}, 60)
                for name in TUNED
            ),
            ahead=len(TUNED),
        ),
        Part("sampling", 15, (Task("XL", "gpu.draw", {"config": XL} | drawing),)),
        Part("loader", 10, (Task("jpeg", "gpu.load", {"arguments": loader}),)),
        Part(
            "predicted", 20,
            tuple(Task(name, "gpu.predicted", {"model": name, "images": 64, "rounds": 5}) for name in NAMED),
            ahead=2,
        ),
    ]  # fmt: skip


def _rehearsal() -> list[Part]:
    def task(name: str, module: str, arguments: dict, environment: dict[str, str] = ONE_THREAD) -> Task:
        return Task(name, module, arguments, 180, environment)

    def tiny(side: str, *more: str, **options: Any) -> Task:
        made = step(B, 2, side, *TINY, *more, **options)
        return replace(made, limit=180, environment=made.environment | INTERPRETER)

    ceilings = {"models": ["B"], "images": 1, "copied": 1 << 24, "square": 256, "rounds": 2}
    swiglu = {"select": ["tests/kernels/test_swiglu.py", "-k", "not native"], "workers": 0, "expected": 10}
    operators = ["--batch=1", "--rounds=1", "--device=cpu", "--time-variants"]
    ragged = {"operator": "norm_modulate", "models": ["odd", "long"], "images": 2, "rounds": 1}
    short = ["train.images=512", "save.every_images=256", "log.every_images=128", "optimizer.warmup_images=0"]
    product = {"config": "digits", "images": 64, "overrides": short, "evaluate": False}
    drawing = {"images": 2, "steps": 2, "guidance": 1.5, "bodies": ["triton", "reference"], "rounds": 1}
    loader = ["--images=8", "--batch=4", "--batches=2", "--repeats=1", "--size=32", "--threads=1"]
    predicted = {"model": "B", "images": 1, "rounds": 1, "operators": ["swiglu"]}
    return [
        Part("ceilings", 40, (task("products", "gpu.ceilings", ceilings),)),
        Part("tests", 60, (task("kernels", "gpu.kernel_tests", swiglu, INTERPRETER),)),
        Part("step", 150, tuple(tiny(side, steps=2) for side in ("ours", "reference", "compiled"))),
        Part("profile", 40, (tiny("ours", module="gpu.profiled", timed=1),)),
        Part("product", 40, (task("digits", "gpu.main_job", product),)),
        Part("variants", 40, (tiny("ours", OPERATORS_AGAIN, steps=2),)),
        Part(
            "operators", 60,
            tuple(
                task(name, "gpu.operators_compared", {"operator": name, "model": "B", "arguments": operators})
                for name in ("swiglu", "norm_modulate", "attention")
            ),
        ),
        Part("counters", 10, (task("B", "gpu.counters", {"model": "B", "images": 1}),)),
        Part("tuning", 40, (task("norm_modulate", "gpu.tune", ragged, INTERPRETER),)),
        Part("sampling", 20, (task("B", "gpu.draw", {"config": B, "overrides": TINY} | drawing, INTERPRETER),)),
        Part("loader", 40, (task("jpeg", "gpu.load", {"arguments": loader}),)),
        Part("predicted", 40, (task("B", "gpu.predicted", predicted, INTERPRETER),)),
    ]  # fmt: skip
