"""Which body of an operator runs on which device, and why."""

import os
from contextlib import nullcontext

import pytest
import torch
from pixelgen_kernels import bodies

CPU, META = torch.zeros(1), torch.zeros(1, device="meta")


def test_body_follows_the_device(monkeypatch):
    monkeypatch.delenv(bodies.VARIABLE, raising=False)
    monkeypatch.setattr(bodies, "native_problem", lambda: "csrc is not compiled")
    monkeypatch.setattr(bodies, "has_native", lambda: False)
    assert bodies.body(CPU) == bodies.body(META) == "reference"
    assert bodies.describe_bodies("cpu") == "operators: reference (csrc is not compiled)"
    assert bodies.choose_body("cuda") == ("triton", "CUDA device")
    monkeypatch.setattr(bodies, "has_native", lambda: True)
    assert bodies.body(CPU) == "native"
    assert bodies.body(META) == bodies.body(CPU.double()) == "reference"
    assert bodies.describe_bodies("cpu") == "operators: native (CPU, csrc compiled)"


@pytest.mark.parametrize("name", bodies.BODIES)
def test_body_can_be_forced(name, monkeypatch):
    monkeypatch.setattr(bodies, "has_native", lambda: True)
    monkeypatch.setattr(bodies, "INTERPRETED", True)
    monkeypatch.setattr(bodies, "interpreter_problem", lambda: "")
    monkeypatch.setenv(bodies.VARIABLE, name)
    assert bodies.body(CPU) == bodies.body(META) == name
    assert bodies.describe_bodies("cpu") == f"operators: {name} (PIXELGEN_OPS={name})"


@pytest.mark.parametrize("name", bodies.BODIES)
def test_a_forced_body_serves_meta_tensors_though_it_cannot_run(name, monkeypatch):
    monkeypatch.setattr(bodies, "has_native", lambda: False)
    monkeypatch.setattr(bodies, "INTERPRETED", False)
    with bodies.forced(name):
        assert bodies.body(META) == name


@pytest.mark.parametrize(
    ("forced", "device", "message"),
    [
        ("cuda", "cpu", "'cuda' names no body; use one of reference, native, triton, or unset it"),
        ("native", "cuda", "native runs on CPU tensors only"),
        ("native", "cpu", "native cannot run: no compiler; or unset PIXELGEN_OPS"),
        ("triton", "cpu", "triton on a CPU tensor needs TRITON_INTERPRET=1 .* or unset PIXELGEN_OPS"),
    ],
)
def test_a_body_that_cannot_run_is_refused(forced, device, message, monkeypatch):
    monkeypatch.setattr(bodies, "native_problem", lambda: "no compiler")
    monkeypatch.setattr(bodies, "has_native", lambda: False)
    monkeypatch.setattr(bodies, "INTERPRETED", False)
    monkeypatch.setenv(bodies.VARIABLE, forced)
    with pytest.raises(ValueError, match=f"PIXELGEN_OPS={message}" if forced != "cuda" else message):
        bodies.choose_body(device)


@pytest.mark.parametrize(
    ("triton", "numpy", "fails"),
    [
        ("3.6.0", "2.4.0", True),
        ("3.6.0+git1234", "2.10.1", True),
        ("3.6.0", "2.3.5", False),
        ("3.7.0", "2.4.0", False),
        ("3.10.0", "2.4.6", False),
    ],
)
def test_versions_that_the_interpreter_fails_with_are_named(triton, numpy, fails, monkeypatch):
    problem = bodies.interpreter_problem(triton, numpy)
    assert bool(problem) == fails
    if fails:
        assert f"Triton {triton} fails with numpy {numpy}" in problem and 'pip install "numpy<2.4"' in problem
    monkeypatch.setattr(bodies, "INTERPRETED", True)
    monkeypatch.setattr(bodies, "interpreter_problem", lambda: problem)
    with bodies.forced("triton"), pytest.raises(ValueError, match="interpreter") if fails else nullcontext():
        assert bodies.choose_body("cpu")[0] == "triton"


def test_forcing_ends_with_its_block(monkeypatch):
    for before in (None, "native"):
        monkeypatch.delenv(bodies.VARIABLE, raising=False)
        if before is not None:
            monkeypatch.setenv(bodies.VARIABLE, before)
        with pytest.raises(RuntimeError), bodies.forced("reference"):
            assert os.environ[bodies.VARIABLE] == "reference"
            raise RuntimeError
        assert os.environ.get(bodies.VARIABLE) == before


def test_plans_for_a_gpu_take_its_body_unless_one_is_asked_for(monkeypatch):
    monkeypatch.delenv(bodies.VARIABLE, raising=False)
    with bodies.gpu_bodies():
        assert bodies.body(META) == "triton"
    monkeypatch.setenv(bodies.VARIABLE, "reference")
    with bodies.gpu_bodies():
        assert bodies.body(META) == "reference"
