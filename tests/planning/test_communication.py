"""What ranks send, counted between real ranks over gloo, against the formula; its time against arithmetic."""

import os
import subprocess
import sys
from math import log2
from pathlib import Path

import pytest
import torch

from pixelgen_fast.errors import InputError
from pixelgen_fast.planning.cards import find_card
from pixelgen_fast.planning.communication import collectives, ring_rate, seconds

WORKER = Path(__file__).parent / "wire_worker.py"
# weights and biases of the worker's network: 96 to 384 to 96, and a norm
SIZES = [96 * 384, 384, 384 * 96, 96, 96, 96]
ALIGNMENT = 2  # bf16 weights to which DeepSpeed pads a group for each rank
THRESHOLDS = {"own": {}, "cut": {"persistent": 0}, "again": {"persistent": 0, "reuse": 0}}


@pytest.fixture(scope="module", params=[2, 4])
def counted(request, tmp_path_factory) -> tuple[int, dict]:
    world, folder = request.param, tmp_path_factory.mktemp("wire")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*launcher, str(WORKER), str(folder)], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return world, torch.load(folder / f"{world}.pt")


def on_the_wire(calls: list[tuple[str, int]], world: int) -> float:
    """Bytes that a rank of a ring sends: an all-reduce passes a tensor twice, a gather or scatter once."""
    total = 0.0
    for name, size in calls:
        kind = name.replace("_", "")
        assert kind.startswith(("allreduce", "allgather", "reducescatter")), name
        total += (2 if kind.startswith("allreduce") else 1) * (world - 1) / world * size
    return total


def test_every_stage_sends_what_the_formula_says(counted):
    """Beside the norm of the gradients, one all-reduce of 4 or 8 bytes, which the formula leaves out."""
    world, found = counted
    for (stage, times, name), calls in found.items():
        sent = collectives(SIZES, stage, times, **THRESHOLDS[name])
        wanted = sum(one.wire(world) for one in sent)
        calls = [(kind, size) for kind, size in calls if size > 8]
        padding = 2 * ALIGNMENT * world * len(calls)
        assert on_the_wire(calls, world) == pytest.approx(wanted, abs=padding), (stage, times, name)


def test_the_formula_by_hand():
    """1000 weights: 4 bytes of a gradient all-reduced, 2 of a weight gathered; 3/4 of a tensor once around 4 ranks."""
    assert sum(one.wire(4) for one in collectives([1000], 1, 3)) == 0.75 * (2 * 4000 + 2000)
    assert sum(one.wire(4) for one in collectives([1000], 2, 3)) == 0.75 * (3 * 2 * 4000 + 2000)
    assert sum(one.wire(4) for one in collectives([900_000, 1000], 3, 3)) == 0.75 * (
        3 * 4 * 901_000 + 3 * 2 * 900_000 + 2000
    )
    assert sum(one.wire(1) for one in collectives([1000], 3, 3)) == 0


def test_a_ring_of_several_nodes_runs_at_the_slower_of_link_and_networks():
    """370 GB/s in a node of H100s; beyond it eight networks of 50 GB/s, or one."""
    h100 = find_card("h100")
    assert ring_rate(h100, 8, 1) == pytest.approx(370e9)
    assert ring_rate(h100, 16, 2) == pytest.approx(8 * 50e9 * 370 / 450)
    assert ring_rate(h100, 4, 4) == pytest.approx(50e9 * 370 / 450)
    sent = collectives([797_000_000], 1, 1)
    wire = 7 / 8 * (2 * 4 + 2) * 797e6 / 370e9
    # four buckets of gradients, two of weights
    assert seconds(sent, h100, 8, 1) == pytest.approx(wire + 6 * 10e-6 * log2(8))
    assert seconds(sent, h100, 1, 1) == 0.0


def test_a_card_without_a_link_plans_one_gpu_only(tmp_path):
    file = tmp_path / "card.json"
    file.write_text('{"gpu": "Mine", "tflop_per_s": 100, "tb_per_s": 1}')
    card = find_card(str(file))
    assert seconds(collectives([1000], 1, 1), card, 1, 1) == 0.0
    with pytest.raises(InputError, match="Mine has no link_gb_per_s, which 2 GPUs need; add it to the file"):
        ring_rate(card, 2, 1)
