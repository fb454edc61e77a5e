"""Every operator, every way of calling it, every ragged size and every body against its definition in float64."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
from pixelgen_kernels import registration, tuning
from pixelgen_kernels.registry import OPERATORS, outputs
from pixelgen_kernels.shapes import RAGGED, ModelShape
from support.operator_runs import CASES, exact, inputs, run

KERNELS = [name for name, operator in OPERATORS.items() if operator.configs]
CONFIGS = [(name, config) for name in KERNELS for config in OPERATORS[name].configs]
# kernels of an operator's file, and with them the case that reads all that they write
LAUNCHERS = {
    launcher.name: (launcher, "swiglu_linear" if launcher.name == "swiglu_backward" else name)
    for name in KERNELS
    for launcher in vars(sys.modules[OPERATORS[name].function.__module__]).values()
    if isinstance(launcher, registration.Operator)
}
# numpy says where an exponential of the interpreter overflows to the infinity that the formula means
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")


@pytest.fixture
def compare(device: str, assert_close: Callable[..., None]) -> Callable[..., None]:
    """compare(case, shape, dtype): outputs and every gradient of one call."""

    def check(case: str, shape: ModelShape, dtype: torch.dtype = torch.float32) -> None:
        given = inputs(case, shape, device, dtype)
        wanted = exact(case, given)
        found = run(case, given)
        assert found.keys() == wanted.keys()
        for name, out in found.items():
            assert_close(CASES[case].name, name, out, wanted[name])

    return check


@pytest.mark.parametrize("shape", RAGGED)
@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients(case, shape, body, compare):
    compare(case, RAGGED[shape])


@pytest.mark.parametrize(("name", "config"), CONFIGS, ids=str)
def test_every_configuration(name, config, compare):
    assert len(OPERATORS[name].configs) <= 6
    with tuning.using(name, config):
        compare(name, RAGGED["long"])


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "config"), CONFIGS, ids=str)
def test_every_configuration_repeats_its_bits(name, config, device):
    """Programs run side by side on a GPU only: sums have one order all the same."""
    with tuning.using(name, config):
        first, again = (run(name, inputs(name, RAGGED["long"], device)) for _ in range(2))
    assert all(torch.equal(x, again[key]) for key, x in first.items())


@pytest.mark.parametrize("name", KERNELS)
def test_float16(name, compare):
    compare(name, RAGGED["odd"], torch.float16)


@pytest.mark.parametrize("name", LAUNCHERS)
def test_one_wrong_element_is_found(name, compare, monkeypatch):
    """A NaN (of whole numbers: another number) as the last element of the first or the last that a launcher returns."""
    launcher, case = LAUNCHERS[name]
    right = launcher.launcher

    def plant(which):
        def wrong(*args):
            result = right(*args)
            # one that returns nothing changes its first argument
            last = (outputs(result) or args[:1])[which].view(-1)[-1:]
            last.copy_(torch.full_like(last, float("nan")) if last.is_floating_point() else last + 1)
            return result

        monkeypatch.setattr(launcher, "launcher", wrong)

    for which in (0, -1):
        plant(which)
        with pytest.raises(AssertionError, match="relative error"):
            compare(case, RAGGED["one"])
