"""The operator benchmark: it times what is right, refuses what is wrong, and its rows say where they come from."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from pixelgen_kernels.launch import ModelShape
from pixelgen_kernels.registry import OPERATORS, Maker

PATH = Path(__file__).parents[2] / "benchmarks" / "operators.py"
spec = importlib.util.spec_from_file_location("operators", PATH)
bench = sys.modules["operators"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench)

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


@pytest.mark.parametrize("name", OPERATORS)
def test_the_definition_agrees_with_itself_in_float64(name):
    operator = OPERATORS[name]
    assert bench.disagreement(operator, operator.reference, TINY, Maker(torch.float32, "cpu")) <= 1.0


def test_a_wrong_output_and_a_wrong_gradient_are_seen():
    operator = OPERATORS["swiglu"]
    for wrong in (
        lambda packed: 1.01 * operator.reference(packed),
        lambda packed: operator.reference(Scaled.apply(packed)),
    ):
        error = bench.disagreement(operator, wrong, TINY, Maker(torch.float32, "cpu"))
        assert error == pytest.approx(0.01 / bench.TOLERANCE[torch.float32], rel=1e-2)


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
    monkeypatch.setattr(
        bench, "provider", lambda name, operator, device: lambda packed: 1.01 * operator.reference(packed)
    )
    status, rows = run("--ops=swiglu", "--providers=ours")
    assert (status, rows) == (1, [])
    assert "RED swiglu tiny ours: off by" in capsys.readouterr().err
