"""The traffic count of a traced graph against graphs small enough to count by hand."""

import importlib.util
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import torch

PATH = Path(__file__).parents[2] / "benchmarks" / "traffic.py"
spec = importlib.util.spec_from_file_location("traffic", PATH)
traffic = sys.modules["traffic"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(traffic)


def counts(function):
    found = defaultdict(traffic.Count)
    with traffic.Recorder(found, {}):
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
