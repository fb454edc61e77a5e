"""The traffic count of a traced graph against graphs small enough to count by hand."""

import importlib.util
import json
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pixelgen_kernels.bodies import forced
from pixelgen_kernels.registry import OPERATORS, Maker
from pixelgen_kernels.report.listing import listed
from pixelgen_kernels.shapes import XL

PATH = Path(__file__).parents[2] / "benchmarks" / "traffic.py"
spec = importlib.util.spec_from_file_location("traffic", PATH)
traffic = sys.modules["traffic"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(traffic)


def counts(function):
    found = defaultdict(traffic.Count)
    with traffic.Recorder(found, traffic.Modelled(), set()):
        function()
    return {name: (c.calls, c.bytes, c.flops) for name, c in found.items()}


def meta(*shape, **options):
    return torch.empty(*shape, device="meta", **options)


def test_an_operation_moves_its_inputs_and_its_output_once():
    a, b = meta(8, 4), meta(4, 16)
    assert counts(lambda: a @ b) == {"mm": (1, 4 * (32 + 64 + 128), 2 * 8 * 4 * 16)}
    assert counts(lambda: a * a) == {"mul": (1, 4 * (32 + 32), 0)}


def test_views_and_allocations_move_nothing():
    a = meta(8, 4)
    assert counts(lambda: (a.t(), a[2:].view(-1), a.chunk(2), a.expand(3, 8, 4), torch.empty_like(a))) == {}


def test_what_is_expanded_is_read_once_and_what_is_overwritten_is_not_read():
    a, row = meta(8, 4), meta(4)
    assert counts(lambda: a + row.expand(8, 4)) == {"add": (1, 4 * (32 + 4 + 32), 0)}
    assert counts(lambda: a.zero_()) == {"zero_": (1, 4 * 32, 0)}
    assert counts(lambda: a.copy_(meta(8, 4))) == {"copy_": (1, 4 * 64, 0)}
    assert counts(lambda: a.add_(1.0)) == {"add_": (1, 4 * 64, 0)}


def test_saved_bytes_are_storages_without_the_weights():
    weight, x = meta(4, 16, requires_grad=True), meta(8, 4, dtype=torch.float32)
    with traffic.saved_bytes({weight.untyped_storage()._cdata}) as kept:
        h = x @ weight
        out = torch.exp(h) * torch.exp(h.view(16, 8)).view(8, 16)
    # x for the weight's gradient, and both exponentials, each of which two operations keep
    assert sum(n for _, n in kept.values()) == 4 * (32 + 2 * 128)
    assert out.requires_grad


@pytest.mark.parametrize("fused", [False, True])
def test_attention_is_one_kernel_and_a_norm_is_one_where_asked(fused):
    q = meta(2, 3, 16, 8, dtype=torch.bfloat16)
    with traffic.GpuKernels(fused):
        found = counts(lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q))
        norms = counts(lambda: torch.nn.functional.rms_norm(q, (8,), meta(8, dtype=torch.bfloat16), 1e-6))
    assert list(found) == ["_scaled_dot_product_flash_attention"]
    assert found["_scaled_dot_product_flash_attention"][2] == 2 * 2 * 2 * 3 * 16 * 16 * 8
    assert (list(norms) == ["rms_norm"]) == fused


# a model like XL of one block, whose launches are as large as the report's
SMALL = replace(XL, depth=1, pixel_depth=1)


def swiglu(batch, width=XL.ffn):
    with forced("triton"):
        packed = Maker(torch.bfloat16, "meta").normal(batch, XL.tokens, 2 * width)
        OPERATORS["swiglu"].function(packed)


def of_swiglu(function):
    """The count of the operator, and what the report is said not to list."""
    found, unlisted = defaultdict(traffic.Count), set()
    limits = {"tensor": 0.0, "memory": 110.0, "issue": 115.0, "special": 20.0}
    known = {item.started.key: (item.started, limits) for item in listed({"swiglu": OPERATORS["swiglu"]}, [XL])}
    with traffic.Recorder(found, traffic.Modelled(known), unlisted):
        function()
    return found["swiglu"], unlisted


def test_a_kernel_of_ours_is_slowed_by_what_binds_it():
    """110 us of memory at 3.0 TB/s are 117.9 at 2.8; 115 us of instructions stay."""
    count, unlisted = of_swiglu(lambda: swiglu(64))
    assert (count.calls, count.kernels, unlisted) == (1, 1, set())
    assert count.seconds["ceilings"] == pytest.approx(115e-6)
    assert count.seconds["best"] == pytest.approx(110e-6 * 3.0 / 2.8)
    rates = traffic.RATES["best"]
    assert rates.time_of({"tensor": 63.0, "memory": 1.0}) == pytest.approx(63e-6 * 798 / 630)
    assert rates.time_of({"tensor": 1.0, "special": 30.0}) == pytest.approx(30e-6)


def test_another_batch_is_counted_by_its_tensors_and_another_kernel_is_said_to_be_unlisted():
    count, unlisted = of_swiglu(lambda: swiglu(32))
    assert unlisted == set()
    assert count.seconds["ceilings"] == pytest.approx(count.bytes / 3.0e12)
    count, unlisted = of_swiglu(lambda: swiglu(64, width=1000))
    assert unlisted == {"swiglu: swiglu_fwd"}
    assert count.seconds["best"] == pytest.approx(count.bytes / 2.8e12)


@pytest.mark.parametrize("body", ["triton", "recompute"])
def test_every_kernel_of_a_step_is_in_the_report(body):
    found = traffic.trace(SMALL, body)
    assert found.unlisted == set()
    assert {name for name, count in found.backward.items() if count.kernels > count.calls} >= {
        "norm_modulate_backward", "pixel_mlp_backward", "flow_loss_backward"
    }  # fmt: skip
    share = 3 * found.total("flops", ("forward",)) / found.batch * found.images_per_second("best") / 989e12
    assert found.share("best") == pytest.approx(share)
    assert found.seconds("best") > found.seconds("ceilings")


def test_a_launch_that_no_case_lists_is_said_and_fails(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(traffic, "MODELS", {"XL": SMALL})
    monkeypatch.setattr(traffic, "OPERATORS", {k: v for k, v in OPERATORS.items() if k != "flow_loss"})
    out = tmp_path / "trace.json"
    monkeypatch.setattr(sys, "argv", ["traffic.py", "--bodies=triton", f"--json={out}"])
    assert traffic.main() == 1
    said = capsys.readouterr()
    assert "NOT IN THE REPORT: a step starts flow_loss: flow_loss_fwd" in said.err
    assert "best: 630 TFLOP/s, 2.8 TB/s" in said.out and "best: of 989 TFLOP/s" in said.out
    assert "flow_loss_backward: flow_loss_bwd" in json.loads(out.read_text())[0]["unlisted"]


def test_a_baseline_of_another_version_is_refused(tmp_path):
    path = tmp_path / "baseline.json"
    path.write_text('{"microseconds": {}}')
    with pytest.raises(ValueError, match=r"baseline\.json lacks XL/.*--update-baseline writes it"):
        traffic.modelled(SMALL, path)
