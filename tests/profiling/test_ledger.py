"""Time by part, of a model whose parts' times are known, and of the events of a GPU that is not there."""

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import DeviceType

from pixelgen_fast.engine.parts import LOSS
from pixelgen_fast.profiling.ledger import Heavy, Ledger, keep, work_of
from pixelgen_fast.profiling.regions import Regions, Work
from pixelgen_fast.profiling.run import profiled_steps

FORWARD, BACKWARD, LOADING = 0.05, 0.08, 0.03


class _SlowBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        time.sleep(BACKWARD)
        return gradient * 2


class Early(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        time.sleep(FORWARD)
        return x.sin()


class Late(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return _SlowBackward.apply(x)


class Objective(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential()
        self.model.early, self.model.late = Early(), Late()

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).mean()


class Sleeper:
    """What is profiled: steps of which each part's time is known."""

    def __init__(self) -> None:
        self.objective = Objective()

    def step(self, at: Any) -> None:
        at("loader")
        time.sleep(LOADING)
        at("forward")
        loss = self.objective(torch.ones(4, requires_grad=True))
        at("backward")
        loss.backward()

    def wait(self) -> None:
        """A CPU has done it."""


@pytest.fixture(scope="module")
def slept() -> tuple[Ledger, float]:
    """The ledger of two steps, and their mean seconds by another clock."""
    sleeper = Sleeper()
    regions = Regions(sleeper.objective)
    with regions:
        trace, seconds = profiled_steps(sleeper, regions, steps=2, gpu=False, done=lambda: None)
    return keep(trace.events(), regions.parts, 2, gpu=False), seconds / 2


def test_the_time_of_a_part_is_what_it_slept(slept: tuple[Ledger, float]) -> None:
    parts = slept[0].parts
    assert parts["early", "forward"] >= FORWARD and parts["late", "backward"] >= BACKWARD
    assert parts["loader", "loader"] >= LOADING
    others = sum(parts.values()) - parts["early", "forward"] - parts["late", "backward"] - parts["loader", "loader"]
    assert others < FORWARD  # nothing of the sleeps is counted for other parts
    assert {part for part, _ in parts} >= {"early", "late", LOSS, "loader"}


def test_the_parts_add_up_to_the_step_by_another_clock(slept: tuple[Ledger, float]) -> None:
    ledger, seconds = slept
    assert sum(ledger.parts.values()) == pytest.approx(ledger.whole, rel=1e-3)
    assert ledger.whole == pytest.approx(seconds, rel=0.05)


def test_idle_is_waiting_and_what_no_operator_runs(slept: tuple[Ledger, float]) -> None:
    """The sleep in forward is Python's, that in backward is inside a node of autograd."""
    ledger = slept[0]
    assert LOADING <= ledger.waiting < ledger.waiting + FORWARD <= ledger.idle
    assert ledger.idle <= ledger.whole - BACKWARD
    assert ledger.busy == pytest.approx(ledger.whole - ledger.idle)
    assert ledger.heavy[0].name == "_SlowBackwardBackward" and ledger.heavy[0].calls == 1


def event(name: str, begin: float, end: float, parent: Any = None, **more: Any) -> SimpleNamespace:
    """One of the profiler's, in microseconds."""
    span = SimpleNamespace(start=begin, end=end, elapsed_us=lambda: end - begin)
    plain = {
        "device_type": DeviceType.CPU, "scope": 0, "sequence_nr": -1, "input_shapes": [], "kernels": [],
        "self_cpu_time_total": end - begin, "is_user_annotation": False,
    }  # fmt: skip
    return SimpleNamespace(name=name, time_range=span, cpu_parent=parent, **plain | more)


def kernel(name: str, begin: float, end: float, **more: Any) -> SimpleNamespace:
    return event(name, begin, end, device_type=DeviceType.CUDA, **more)


def test_kernels_count_for_the_operator_that_started_them_and_backward_for_its_forward() -> None:
    """Forward and backward run on two threads of the host; two kernels overlap by 20 us."""
    step = event("step", 0, 1000)
    stage = event("forward", 0, 400, step)
    span = [SimpleNamespace(name="model.blocks.0", duration=100)]  # a range has its kernels' span on the device
    block = event("model.blocks.0", 10, 300, stage, kernels=span)
    first, second = ([SimpleNamespace(name="gemm", duration=us)] for us in (100, 150))
    product = event("aten::mm", 20, 30, block, sequence_nr=7, kernels=first)
    view = event(
        "aten::view", 5, 8, stage, sequence_nr=7
    )  # another operator began at the same number, and made no node
    node = event("autograd::engine::evaluate_function: MmBackward0", 500, 600, scope=1, sequence_nr=7)
    gradient = event("aten::mm", 510, 520, node, kernels=second)
    kernels = [kernel("gemm", 100, 200), kernel("gemm", 180, 330), kernel("step", 0, 1000, is_user_annotation=True)]
    events = [step, stage, view, block, product, node, gradient, *kernels]
    ledger = keep(events, {"model.blocks.0": "blocks"}, 1, gpu=True)
    assert ledger.parts == {("blocks", "forward"): pytest.approx(1e-4), ("blocks", "backward"): pytest.approx(1.5e-4)}
    assert ledger.busy == pytest.approx(230e-6)
    assert [(h.name, h.kernel, h.seconds) for h in ledger.heavy[:1]] == [("aten::mm", "gemm", pytest.approx(2.5e-4))]


def test_work_of_an_operator_by_shapes_or_of_ours_by_name() -> None:
    counted = {
        ("aten::mm", ((2, 3), (3, 4))): Work(2, 96, 200),
        ("pixelgen::swiglu_backward", ((8, 8),)): Work(1, 10, 100),
        ("pixelgen::swiglu_backward", ((4, 8),)): Work(3, 30, 60),
    }
    assert work_of(Heavy("aten::mm", ((2, 3), (3, 4)), 1, 1.0), counted) == (48, 100)
    assert work_of(Heavy("aten::mm", ((2, 3), (3, 9)), 1, 1.0), counted) is None
    assert work_of(Heavy("swigluBackward", ((8, 4),), 1, 1.0), counted) == (10, 40)
