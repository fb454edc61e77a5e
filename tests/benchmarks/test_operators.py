"""The operator benchmark: it times what is right, refuses what is wrong, and its rows say where they come from."""

import json
import math
import sys

import operators as bench
import pytest
import torch
from pixelgen_kernels.agreement import tolerance
from pixelgen_kernels.registry import OPERATORS, Maker
from pixelgen_kernels.shapes import ModelShape

CASES = {case: operator for named in OPERATORS.values() for case, operator in bench.cases(named).items()}
TINY = ModelShape("tiny", width=32, heads=2, ffn=24, depth=1, pixel_depth=1, parameters=400, batch=2, tokens=4,
                  pixels=16, channels=8, pixel_hidden=32, patch=4)  # fmt: skip


class Scaled(torch.autograd.Function):
    """The identity with a gradient that is 1 % too large."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dx):
        return 1.01 * dx


@pytest.mark.parametrize("case", CASES)
def test_the_definition_agrees_with_itself_in_float64(case):
    operator = CASES[case]
    assert bench.disagreement(operator, operator.definition, TINY, Maker(torch.float32, "cpu")) <= 1.0


def test_a_wrong_output_and_a_wrong_gradient_are_seen():
    operator = OPERATORS["swiglu"]
    for wrong in (
        lambda packed: 1.01 * operator.definition(packed),
        lambda packed: operator.definition(Scaled.apply(packed)),
    ):
        error = bench.disagreement(operator, wrong, TINY, Maker(torch.float32, "cpu"))
        assert error == pytest.approx(0.01 / tolerance("swiglu", torch.float32), rel=1e-2)


class Planted(torch.autograd.Function):
    """The identity, with one NaN in what it returns or in its gradient."""

    @staticmethod
    def forward(ctx, x, where):
        ctx.where = where
        return Planted.spoiled(x, where == "output")

    @staticmethod
    def backward(ctx, dx):
        return Planted.spoiled(dx, ctx.where == "gradient"), None

    @staticmethod
    def spoiled(x, here):
        x = x.clone()
        if here:
            x.view(-1)[-1] = torch.nan
        return x


@pytest.mark.parametrize("where", ["output", "gradient"])
@pytest.mark.parametrize("name", ["swiglu", "norm_modulate", "flow_loss"])
def test_one_nan_is_never_right(name, where):
    operator = OPERATORS[name]
    first = next(iter(operator.inputs(TINY, Maker(torch.float32, "meta"))))

    def kernel(**inputs):
        return operator.function(**inputs | {first: Planted.apply(inputs[first], where)})

    assert bench.disagreement(operator, kernel, TINY, Maker(torch.float32, "cpu")) == math.inf


def test_a_gradient_that_does_not_flow_is_never_right():
    operator = OPERATORS["norm_modulate"]

    def kernel(**inputs):
        return operator.definition(**inputs | {"shift_BD": inputs["shift_BD"].detach()})

    assert bench.disagreement(operator, kernel, TINY, Maker(torch.float32, "cpu")) == math.inf


@pytest.fixture
def run(monkeypatch, tmp_path):
    """run(*arguments) -> (exit status, rows written)."""
    out = tmp_path / "rows.jsonl"
    monkeypatch.setitem(bench.MODELS, "tiny", TINY)
    monkeypatch.setattr(bench, "ceiling", lambda device, dtype: bench.Ceiling(1e10, 1e11))

    def call(*arguments):
        monkeypatch.setattr(
            sys,
            "argv",
            ["operators.py", "--device=cpu", "--models=tiny", "--batch=2", "--rounds=3", f"--out={out}", *arguments],
        )
        status = bench.main()
        return status, [json.loads(x) for x in out.read_text().splitlines()] if out.exists() else []

    return call


def test_rows_name_their_machine_versions_and_commit(run):
    status, rows = run("--ops=swiglu", "--providers=eager")
    assert status == 0
    assert [(row["operator"], row["pass"], row["provider"]) for row in rows] == [
        ("swiglu", which, "eager") for which in bench.PASSES
    ]
    for row, size in zip(rows, (3, 5, 8), strict=True):
        assert 0 < row["p20"] <= row["p50"] <= row["p80"]
        # forward reads 2 F and writes F of each row; backward reads 2 F + F and writes 2 F
        assert row["gb_per_s"] == pytest.approx(size * 4 * 2 * 4 * 24 / (row["p50"] * 1e-3) / 1e9)
        assert {"date", "machine", "system", "python", "torch", "triton", "commit"} <= set(row)


def test_an_operator_that_is_wrong_is_not_timed(run, monkeypatch, capsys):
    monkeypatch.setattr(bench, "provider", lambda *_: lambda packed: 1.01 * OPERATORS["swiglu"].definition(packed))
    status, rows = run("--ops=swiglu", "--providers=ours")
    assert (status, rows) == (1, [])
    assert "RED swiglu tiny ours: off by" in capsys.readouterr().err


def test_a_kernel_that_writes_nan_turns_the_benchmark_red(run, monkeypatch, capsys):
    definition = OPERATORS["swiglu"].definition
    monkeypatch.setattr(bench, "provider", lambda *_: lambda packed: Planted.apply(definition(packed), "output"))
    status, rows = run("--ops=swiglu", "--providers=ours")
    assert (status, rows) == (1, [])
    assert "RED swiglu tiny ours: off by inf" in capsys.readouterr().err


def test_variants_are_compared_and_only_timed_where_asked(run, monkeypatch):
    compared = []

    def provider(name, case, operator, device):
        compared.append((name, case))
        return operator.definition

    monkeypatch.setattr(bench, "provider", provider)
    both = ["pixel_modulate", "pixel_modulate_plain"]
    ours, eager = ([(name, case) for case in both] for name in ("ours", "eager"))
    for flags, expected, timed in (
        # where a variant is not timed, there is nothing to say of others than ours
        ((), {*ours, eager[0]}, both[:1]),
        (("--time-variants",), {*ours, *eager}, both),
    ):
        compared.clear()
        status, rows = run("--ops=pixel_modulate", "--providers=ours,eager", "--passes=forward", *flags)
        assert (status, set(compared)) == (0, expected)
        assert [row["case"] for row in rows if row["provider"] == "eager"][-len(timed) :] == timed


def test_a_provider_that_is_not_there_is_said_and_not_red(run, capsys):
    status, rows = run("--ops=swiglu,attention", "--providers=liger,flash,sdpa", "--passes=forward")
    assert status == 0
    assert [(row["case"], row["provider"]) for row in rows] == [("attention", "sdpa")]
    said = capsys.readouterr().err
    assert "not there: swiglu tiny liger: liger-kernel" in said
    assert "swiglu tiny flash" not in said  # which has nothing for it
    assert "PIXELGEN_ATTENTION=flash cannot run on cpu" in said
