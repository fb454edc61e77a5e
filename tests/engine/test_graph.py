"""A step that a CUDA graph may hold: it repeats operator for operator, and no number comes back to the host."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from pixelgen_kernels.bodies import forced
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from pixelgen_fast import config as cfg
from pixelgen_fast.diffusion.path import to_unit
from pixelgen_fast.engine import graph
from pixelgen_fast.engine.objective import FlowMatching, SequenceLoss, TrainingObjective
from pixelgen_fast.models import deco, fractal, jit, mar, patch_ar, pixeldit
from pixelgen_fast.models.system import SequentialSystem

CLASSES, IMAGE, BATCH = 3, 8, 2
SMALL = dict(hidden_size=24, num_heads=2, patch_size=4)
PIXELDIT = dict(SMALL, patch_depth=2, pixel_hidden_size=8, pixel_depth=1)
FRACTAL = dict(SMALL, generator="causal", guiding_pixel=False, depth=1, inner=[fractal.Level(1, 16, 2, 1)], dropout=0.0)
MODELS = {
    "pixeldit": (pixeldit, PIXELDIT, cfg.Objective()),
    "pixeldit, post": (pixeldit, dict(PIXELDIT, post_modulation=True), cfg.Objective(time="uniform")),
    "pixeldit, recomputed head": (pixeldit, dict(PIXELDIT, pixel_attention_save="recompute"), cfg.Objective()),
    "jit": (jit, dict(SMALL, depth=2, bottleneck=8, context_length=2, context_start=1), cfg.Objective("x", "v")),
    "deco": (deco, dict(SMALL, patch_depth=1, decoder_width=8, decoder_depth=1), cfg.Objective(frequency_weight=1.0)),
    "pixeldit, energy guided": (pixeldit, PIXELDIT, cfg.Objective(path="energy_guided")),
    "jit, energy guided": (
        jit,
        dict(SMALL, depth=2, bottleneck=8, context_length=0),
        cfg.Objective("x", "v", path="energy_guided"),
    ),
    "patch autoregressor": (patch_ar, dict(SMALL, depth=1, head_depth=1, head_width=16), cfg.Objective("x", "v")),
    "patch autoregressor, masked": (
        patch_ar,
        dict(SMALL, trunk="masked", depth=1, head="pixel", head_depth=1, pixel_channels=8),
        cfg.Objective(),
    ),
    "fractal, causal": (fractal, FRACTAL, cfg.Objective()),
    "mar": (mar, dict(SMALL, depth=1, head_depth=1, head_width=16, dropout=0.0), cfg.Objective()),
}
# what hands a number or a shape that depends on data to the host
READS = ("_local_scalar_dense", "item", "nonzero", "masked_select", "equal", "is_nonzero", "unique", "bincount")


def objective(name: str) -> TrainingObjective:
    system, settings, objective = MODELS[name]
    model = system.build(system.Settings(**settings), IMAGE, CLASSES)
    kind = SequenceLoss if isinstance(model, SequentialSystem) else FlowMatching
    return kind(model, objective, 1, null_class=CLASSES)


def batch(number: int) -> tuple[Tensor, Tensor, Tensor]:
    """Micro-batch `number` of a run: other images, labels and image numbers each time."""
    generator = torch.Generator().manual_seed(number)
    images = torch.randint(0, 256, (BATCH, IMAGE, IMAGE, 3), dtype=torch.uint8, generator=generator)
    numbers = torch.arange(BATCH) + BATCH * number
    return images, (numbers * 7) % CLASSES, numbers


class Operators(TorchDispatchMode):
    """Every operator of the dispatcher with its arguments; a tensor stands for its type, shape and strides."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def plain(x: Any) -> Any:
            return (x.dtype, tuple(x.shape), x.stride()) if isinstance(x, Tensor) else x

        self.found.append((func.name(), tree_map(plain, (args, kwargs or {}))))
        return func(*args, **(kwargs or {}))


def recorded(module: TrainingObjective, inputs: tuple[Tensor, ...]) -> list[tuple[str, Any]]:
    for parameter in module.parameters():
        parameter.grad = None
    with Operators() as operators:
        module(*inputs).backward()
    return operators.found


def host_reads(found: list[tuple[str, Any]]) -> list[str]:
    return [name for name, _ in found if name.split("::")[1].split(".")[0] in READS]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("body", ["reference", "native", "triton"])
def test_two_steps_in_a_row_are_the_same_operators(name: str, body: str) -> None:
    """Kernels on shapes only: there a number that is read back has no value and raises."""
    device = "meta" if body == "triton" else "cpu"
    with forced(body):
        with torch.device(device):
            module = objective(name)
        # the first pass makes tables and opens libraries, as the passes before a capture do
        _, first, second = (recorded(module, tuple(x.to(device) for x in batch(number))) for number in range(3))
    assert first == second
    assert len(first) > 50 and not host_reads(first)


class Reads(nn.Module):
    """The identity on images, with one number that goes through the host."""

    fuses_loss = draws = guides_itself = False
    grounding_drop = None
    encode = staticmethod(to_unit)

    def forward(self, z: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return z * self.weight * float(t.sum())

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))


def test_a_number_that_is_read_back_is_found() -> None:
    module = FlowMatching(Reads(), cfg.Objective(), 1, null_class=CLASSES)
    first, second = (recorded(module, batch(number)) for number in (0, 1))
    assert first != second and host_reads(first)
    with pytest.raises(RuntimeError), torch.device("meta"):
        recorded(module.to("meta"), tuple(x.to("meta") for x in batch(0)))


@pytest.mark.parametrize(
    ("train", "world", "accumulation", "device", "message"),
    [
        ({}, 1, 1, "cpu", "the run is on cpu"),
        ({}, 2, 1, "cuda", "there are 2 ranks"),
        ({"zero_stage": 2}, 1, 1, "cuda", "train.zero_stage is 2"),
        ({"global_batch": 128}, 1, 2, "cuda", "2 micro-batches.* set train.micro_batch=128"),
        ({"recompute": "blocks"}, 1, 1, "cuda", "train.recompute is blocks"),
    ],
)
def test_what_cannot_be_captured_is_refused(
    train: dict[str, Any], world: int, accumulation: int, device: str, message: str
) -> None:
    config = cfg.Config(train=cfg.Train(cuda_graph=True, **train))
    with pytest.raises(cfg.ConfigError, match=f"train.cuda_graph is on, but .*{message}"):
        graph.check_graph(config, torch.device(device), world, accumulation, objective("pixeldit"))
    off = replace(config, train=replace(config.train, cuda_graph=False))
    graph.check_graph(off, torch.device(device), world, accumulation, objective("pixeldit"))


def test_a_teacher_and_dropout_are_refused() -> None:
    config = cfg.Config(train=cfg.Train(cuda_graph=True))
    aligned = objective("pixeldit")
    aligned.alignment = nn.Identity()
    with pytest.raises(cfg.ConfigError, match=r"alignment\.teacher"):
        graph.check_graph(config, torch.device("cuda"), 1, 1, aligned)
    system, settings, predict = MODELS["jit"]
    model = system.build(system.Settings(**settings, dropout=0.1), IMAGE, CLASSES)
    with pytest.raises(cfg.ConfigError, match="dropout"):
        graph.check_graph(config, torch.device("cuda"), 1, 1, FlowMatching(model, predict, 1, null_class=CLASSES))


def test_shapes_that_are_drawn_are_refused() -> None:
    model = fractal.build(fractal.Settings(**(FRACTAL | dict(generator="masked"))), IMAGE, CLASSES)
    config = cfg.Config(train=cfg.Train(cuda_graph=True))
    with pytest.raises(cfg.ConfigError, match="the shapes of a step, are drawn anew"):
        graph.check_graph(config, torch.device("cuda"), 1, 1, SequenceLoss(model, cfg.Objective(), 1, CLASSES))


def test_capture_records_the_whole_objective(monkeypatch: pytest.MonkeyPatch) -> None:
    """The inputs that a graph is made for are those of a training step, in its order."""
    calls = []
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", lambda *args, **options: calls.append((args, options)))
    module = objective("pixeldit")
    graph.capture(module, BATCH, IMAGE, torch.device("cpu"))
    ((captured, inputs), options), *more = calls
    assert captured is module and not more and options["allow_unused_input"]
    assert [(x.dtype, x.shape) for x in inputs] == [(x.dtype, x.shape) for x in batch(0)]


def test_hooks_are_away_while_it_is_captured_and_back_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch refuses a module with hooks, and DeepSpeed registers some on every module that it trains."""
    module, ran = objective("pixeldit"), []

    def refuse_hooks(callable: nn.Module, *_: Any, **__: Any) -> None:
        tables = (callable._backward_hooks, callable._forward_hooks, callable._forward_pre_hooks)
        assert not any(tables), "Modules must not have hooks registered at the time they are passed."

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", refuse_hooks)
    module.register_forward_pre_hook(lambda *_: ran.append("before"))
    module.register_forward_hook(lambda *_: ran.append("after"))
    graph.capture(module, BATCH, IMAGE, torch.device("cpu"))
    module(*batch(0))
    assert ran == ["before", "after"]


@pytest.mark.gpu
@pytest.mark.parametrize("name", MODELS)
def test_a_graph_trains_like_the_step_itself(name: str) -> None:
    """The same kernels on the same numbers: losses and weights after five steps are equal bit for bit."""
    results = []
    for captured in (False, True):
        torch.manual_seed(0)
        with torch.device("cuda"):
            module = objective(name).bfloat16()
            for parameter in module.parameters():
                nn.init.normal_(parameter, std=0.1)
        if captured:
            graph.capture(module, BATCH, IMAGE, torch.device("cuda"))
        optimizer, losses = torch.optim.SGD(module.parameters(), lr=0.1), []
        for number in range(5):
            loss = module(*(x.cuda() for x in batch(number)))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses += [loss.detach().clone(), *(part.clone() for part in module.parts.values())]
        results.append([torch.stack(losses), *module.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
