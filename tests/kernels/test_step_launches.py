"""What is judged is what runs: every launch of whole training steps, against the report's list and the step's own plan.

A step runs in Triton's interpreter, and each kernel start is caught where Triton receives it, with the real arguments.
Its key is made here from Triton's rules, apart from pixelgen_kernels.launch, which makes the lists.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from pixelgen_kernels.registry import launches
from pixelgen_kernels.shapes import JIT, PIXELDIT, PIXELDIT_OPTIONS, TRANSFORMER, ModelShape
from triton.runtime.interpreter import InterpretedFunction

from pixelgen_fast.config import Objective
from pixelgen_fast.engine.launches import module_launches
from pixelgen_fast.engine.objective import FlowMatching
from pixelgen_fast.engine.optimizer import AdamWEMA
from pixelgen_fast.engine.parallel import wrap_blocks
from pixelgen_fast.layers import SwiGLU
from pixelgen_fast.models import deco, jit, pixeldit

BATCH, CLASSES = 2, 3
SIZES = dict(hidden_size=32, num_heads=2, patch_size=4)
PIXELS = dict(SIZES, patch_depth=2, pixel_depth=1, pixel_hidden_size=8)
# system, settings, recompute, image size
STEPS = {
    "gated": (pixeldit, PIXELS, "none", 8),
    "post, saves nothing": (
        pixeldit, dict(PIXELS, post_modulation=True, pixel_attention_save="recompute"), "none", 8
    ),
    "tanh, operators recomputed": (pixeldit, dict(PIXELS, gelu_tanh=True), "operators", 8),
    "post, tanh, blocks recomputed": (pixeldit, dict(PIXELS, post_modulation=True, gelu_tanh=True), "blocks", 8),
    "odd": (
        pixeldit, dict(PIXELS, hidden_size=36, num_heads=3, pixel_hidden_size=12), "none", 12
    ),
    "energy guided": (pixeldit, PIXELS, "none", 8),
    "jit": (jit, dict(SIZES, depth=3, bottleneck=8, context_length=2, context_start=1), "none", 8),
    "deco": (deco, dict(SIZES, patch_depth=2, decoder_width=8, decoder_depth=1), "none", 8),
}  # fmt: skip


def shape(name: str) -> ModelShape:
    """The same sizes as the report names them."""
    system, settings, _, image = STEPS[name]
    width = settings["hidden_size"]
    ffn = -(-int(2 * 4 * width / 3) // SwiGLU.MULTIPLE) * SwiGLU.MULTIPLE
    channels = settings.get("pixel_hidden_size", 0)
    return ModelShape(
        name, width=width, heads=settings["num_heads"], ffn=ffn, depth=2, pixel_depth=1,
        parameters=4 * (257 if name == "odd" else 256), batch=BATCH, tokens=(image // 4) ** 2, pixels=16,
        channels=channels, pixel_hidden=4 * channels, patch=4,
        cases={pixeldit: (*PIXELDIT, *PIXELDIT_OPTIONS), jit: JIT, deco: TRANSFORMER}[system],
    )  # fmt: skip


def key_of_start(kernel: InterpretedFunction, arguments: tuple, keywords: dict) -> tuple:
    """Triton's key of a start: what it compiles for, as its documentation of specialisation has it."""
    general = kernel.kwargs.get("do_not_specialize") or ()
    given = dict(zip(kernel.arg_names, arguments, strict=False))
    options = {name: value for name, value in keywords.items() if name not in kernel.arg_names}
    given |= {name: value for name, value in keywords.items() if name in kernel.arg_names}
    assert set(given) == set(kernel.arg_names)
    constexprs = {name for name, kind in kernel.fn.__annotations__.items() if "constexpr" in str(kind)}
    signature, constants, aligned = [], [], []
    for name, value in given.items():
        if name in constexprs or value is None or (type(value) is int and value == 1 and name not in general):
            constants.append((name, str(value)))
        elif isinstance(value, torch.Tensor):
            short = str(value.dtype).removeprefix("torch.")
            short = short.replace("bfloat", "bf").replace("float", "fp").replace("uint", "u").replace("int", "i")
            signature.append((name, "*" + short.replace("bool", "u1")))
            aligned += [name] * (value.data_ptr() % 16 == 0)
        elif isinstance(value, float):
            signature.append((name, "fp32"))
        else:
            signature.append((name, "i32" if abs(value) < 2**31 else "i64"))
            aligned += [name] * (value % 16 == 0 and name not in general)
    warps, stages = options.pop("num_warps"), options.pop("num_stages")
    return (
        kernel.fn.__name__, tuple(sorted(signature)), tuple(sorted(aligned)), tuple(sorted(constants)), warps, stages,
        tuple(sorted(options.items())),
    )  # fmt: skip


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """The key of each kernel start, in their order; the kernels run as well."""
    found: list[tuple] = []
    run = InterpretedFunction.run

    def recording(self: InterpretedFunction, *args: object, grid: object, warmup: bool, **kwargs: object) -> object:
        found.append(key_of_start(self, args, kwargs))
        return run(self, *args, grid=grid, warmup=warmup, **kwargs)

    monkeypatch.setattr(InterpretedFunction, "run", recording)
    return found


def objective(name: str) -> FlowMatching:
    system, settings, recompute, image = STEPS[name]
    model = system.build(system.Settings(**settings), image, CLASSES)
    wrap_blocks(model.blocks(), recompute=recompute, compile_blocks=False)
    predict = Objective(predict="x", loss="v") if system is jit else Objective()
    if name == "energy guided":
        predict = Objective(path="energy_guided")
    return FlowMatching(model, predict, seed=5, null_class=CLASSES)


def batch(name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    image = STEPS[name][3]
    images = torch.randint(0, 256, (BATCH, image, image, 3), dtype=torch.uint8)
    return images, torch.arange(BATCH) % CLASSES, torch.arange(BATCH) + 2**33


def update_shard(numel: int, device: str) -> None:
    """The optimizer's part of a step, on a flat shard as ZeRO hands it one."""
    param = torch.nn.Parameter(torch.zeros(numel, device=device))
    param.grad = torch.zeros_like(param)
    AdamWEMA([param], ema_decays=(0.999,), clip_norm=1.0).step()


def listed(name: str) -> dict[str, set[tuple]]:
    """Keys of the report's list at a step's sizes, by case."""
    found = launches(shape(name), dtype=torch.float32)
    return {case: {one.key for one in some} for case, some in found.items()}


@pytest.fixture
def step(starts: list[tuple]) -> Callable[[str], Counter]:
    """step(name) -> how often each key was started by a whole training step."""

    def run(name: str) -> Counter:
        starts.clear()
        objective(name)(*batch(name)).backward()
        micro_batch = Counter(starts)
        with torch.device("meta"):
            module = objective(name)
            planned = Counter(one.key for one in module_launches(module, *(x.to("meta") for x in batch(name))))
        assert micro_batch == planned, "the plan of the step, which warm-up follows, is not what the step starts"
        update_shard(shape(name).parameters // 4, "cpu")
        return Counter(starts)

    return run


def test_all_that_steps_start_is_judged_and_all_that_is_judged_is_started(step: Callable[[str], Counter]) -> None:
    started = {name: set(step(name)) for name in STEPS}
    for name, keys in started.items():
        unjudged = keys - set().union(*listed(name).values())
        assert not unjudged, f"{name} starts what the report does not list: {sorted(key[0] for key in unjudged)}"

    of_pixeldit = set().union(*(started[name] for name, (system, *_) in STEPS.items() if system is pixeldit))
    judged = {"gated": of_pixeldit, "jit": started["jit"], "deco": started["deco"]}
    for name, keys in judged.items():
        for case, wanted in listed(name).items():
            assert wanted <= keys, f"no step of {name} starts {sorted(key[0] for key in wanted - keys)} of {case}"
    for case, wanted in listed("odd").items():
        if case in PIXELDIT:
            assert wanted <= started["odd"], f"no odd step starts all of {case}"


def test_another_launch_is_found(step: Callable[[str], Counter], monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof fails where a launcher starts something that its plan does not say."""
    from pixelgen_kernels import launch

    real = launch.Launch.start

    def other(self: launch.Launch, *arguments: object) -> None:
        if launch.is_recording() or "swiglu" not in self.name:
            return real(self, *arguments)
        return self.kernel[(self.grid,)](*arguments, **(self.keywords | {"num_stages": 7}))

    monkeypatch.setattr(launch.Launch, "start", other)
    with pytest.raises(AssertionError, match="is not what the step starts"):
        step("deco")
