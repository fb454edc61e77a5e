"""The count of a traced graph against graphs small enough to count by hand."""

from dataclasses import replace

import pytest
import torch
from pixelgen_kernels.bodies import forced
from pixelgen_kernels.registry import OPERATORS, Maker
from pixelgen_kernels.report.listing import listed
from pixelgen_kernels.shapes import XL

from pixelgen_fast.planning.gpu_kernels import gpu_kernels
from pixelgen_fast.planning.rates import Rates
from pixelgen_fast.planning.trace import Modelled, Recorder, Trace, modelled

CEILINGS, BEST = Rates(798e12, 3.0e12), Rates(630e12, 2.8e12)


def traced(function, ours=None):
    trace = Trace(1)
    with Recorder(trace, ours or Modelled(), lambda: ("", "forward")):
        function()
    return trace


def counts(function):
    return [(op.name, op.bytes, op.flops) for op in traced(function).operations]


def meta(*shape, **options):
    return torch.empty(*shape, device="meta", **options)


def test_an_operation_moves_its_inputs_and_its_output_once():
    a, b = meta(8, 4), meta(4, 16)
    assert counts(lambda: a @ b) == [("mm", 4 * (32 + 64 + 128), 2 * 8 * 4 * 16)]
    assert counts(lambda: a * a) == [("mul", 4 * (32 + 32), 0)]


def test_views_and_allocations_move_nothing():
    a = meta(8, 4)
    assert counts(lambda: (a.t(), a[2:].view(-1), a.chunk(2), a.expand(3, 8, 4), torch.empty_like(a))) == []


def test_what_is_expanded_is_read_once_and_what_is_overwritten_is_not_read():
    a, row = meta(8, 4), meta(4)
    assert counts(lambda: a + row.expand(8, 4)) == [("add", 4 * (32 + 4 + 32), 0)]
    assert counts(lambda: a.zero_()) == [("zero_", 4 * 32, 0)]
    assert counts(lambda: a.copy_(meta(8, 4))) == [("copy_", 4 * 64, 0)]
    assert counts(lambda: a.add_(1.0)) == [("add_", 4 * 64, 0)]


def test_an_operation_that_returns_nothing_moves_what_it_changes():
    """AdamW with one average: five float32 streams read, of them weights, two moments and the average written."""
    n = 1 << 20
    streams = [meta(n) for _ in range(4)]
    with forced("triton"):
        (op,) = traced(
            lambda: OPERATORS["adamw_ema"].function(
                *streams, [meta(n)], lr=1e-4, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.0,
                step=meta(()), ema_decays=[meta(())],
            )
        ).operations[-1:]  # fmt: skip
    assert op.name == "adamw_ema" and op.bytes == pytest.approx(4 * n * (5 + 4), rel=1e-4)


@pytest.mark.parametrize("fused", [False, True])
def test_attention_is_one_kernel_and_a_norm_is_one_where_asked(fused):
    q = meta(2, 3, 16, 8, dtype=torch.bfloat16)
    mask = meta(16, 16, dtype=torch.bool)
    with gpu_kernels(fused):
        ((name, _, flops),) = counts(lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q))
        causal = counts(lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True))
        masked = counts(lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=mask))
        norms = counts(lambda: torch.nn.functional.rms_norm(q, (8,), meta(8, dtype=torch.bfloat16), 1e-6))
    assert (name, flops) == ("_scaled_dot_product_flash_attention", 2 * 2 * 2 * 3 * 16 * 16 * 8)
    assert [entry[0] for entry in causal] == [name]
    assert masked[-1][0] == "_scaled_dot_product_efficient_attention" and masked[-1][2] == flops
    assert ([entry[0] for entry in norms] == ["rms_norm"]) == fused


def swiglu(batch, width=XL.ffn):
    with forced("triton"):
        packed = Maker(torch.bfloat16, "meta").normal(batch, XL.tokens, 2 * width)
        OPERATORS["swiglu"].function(packed)


def of_swiglu(function):
    """The operation, and what the report is said not to list."""
    limits = {"tensor": 0.0, "memory": 110.0, "issue": 115.0, "special": 20.0}
    known = {item.started.key: (item.started, limits) for item in listed({"swiglu": OPERATORS["swiglu"]}, [XL])}
    trace = traced(function, Modelled(known))
    return next(op for op in trace.operations if op.name == "swiglu"), trace.unlisted


def test_a_kernel_of_ours_is_slowed_by_what_binds_it():
    """110 us of memory at 3.0 TB/s are 117.9 at 2.8; 115 us of instructions stay, and double at half their rate."""
    op, unlisted = of_swiglu(lambda: swiglu(64))
    assert (op.kernels, unlisted) == (1, set())
    assert op.seconds(CEILINGS) == pytest.approx(115e-6)
    assert op.seconds(BEST) == pytest.approx(110e-6 * 3.0 / 2.8)
    assert op.seconds(replace(BEST, instructions=0.5)) == pytest.approx(230e-6)
    assert BEST.time_of({"tensor": 63.0, "memory": 1.0}) == pytest.approx(63e-6 * 798 / 630)
    assert BEST.time_of({"tensor": 1.0, "special": 30.0}) == pytest.approx(30e-6)


def test_another_batch_is_scaled_and_another_kernel_is_said_to_be_unlisted():
    op, unlisted = of_swiglu(lambda: swiglu(32))
    assert unlisted == set()
    assert op.seconds(CEILINGS) == pytest.approx(115e-6 / 2)
    op, unlisted = of_swiglu(lambda: swiglu(64, width=1000))
    assert unlisted == {"swiglu: swiglu_fwd"}
    assert op.seconds(BEST) == pytest.approx(op.bytes / 2.8e12)


def test_a_baseline_of_another_version_is_refused(tmp_path):
    path = tmp_path / "baseline.json"
    path.write_text('{"microseconds": {}}')
    with pytest.raises(ValueError, match=r"baseline\.json lacks XL/.*--update-baseline writes it"):
        modelled([XL], path)
