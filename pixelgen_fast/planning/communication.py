"""What the ranks of a run send each other in a step, at each ZeRO stage, and how long it takes.

    N weights in bf16, W ranks, A micro-batches a step; gradients are communicated in float32

    stage 1    all-reduce 4 N  once           all-gather 2 N  once, after the optimizer
    stage 2    all-reduce 4 N  A times        all-gather 2 N  once
    stage 3    reduce-scatter 4 N  A times    all-gather 2 (N' + max(0, N' - R / 2))  A times, before they are used
                                              all-gather 2 (N - N')  once: small weights, which every rank keeps whole

    a ring moves per rank   all-reduce 2 (W - 1) / W of the tensor,   the other two (W - 1) / W

DeepSpeed reduces whole buckets on all ranks at stages 1 and 2, although a rank needs its share only. N' are weights of
parameters above 100,000; stage 3 keeps a gathered weight until backward if fewer than R = 1e9 weights are used between.
The norm of the gradients, 4 or 8 bytes, is left out. Stages 1 and 2 wait for what they send (overlap_comm is off),
stage 3 sends beside the computation (it is on there).

A ring in a node runs at the link of a GPU, one through several nodes at the networks of all GPUs of a node together if
that is less. 82 % of a link is what rings reach: NCCL's developers name 370 GB/s of NVLink 4's 450 (NVIDIA/nccl-tests
issue 212). A collective begins after 10 us for each doubling of the ranks (assumed).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pixelgen_fast.errors import InputError
from pixelgen_fast.planning.cards import Card

GRADIENT, WEIGHT = 4, 2  # bytes
PERSISTENT = 100_000  # weights of a parameter that stage 3 keeps whole, at most
REUSE = 1_000_000_000  # weights used before the next use of one that stage 3 keeps
SHARE = 370 / 450  # of a link that a ring reaches
START = 10e-6  # seconds for each doubling of the ranks
BUCKET = 200_000_000  # weights that are reduced at once

Kind = Literal["all-reduce", "reduce-scatter", "all-gather"]
ROUNDS: dict[Kind, int] = {"all-reduce": 2, "reduce-scatter": 1, "all-gather": 1}


@dataclass(frozen=True)
class Collective:
    """What is sent `times` a step. bytes: of the tensor that is whole on every rank."""

    kind: Kind
    of: str
    bytes: int
    times: int

    def wire(self, world: int) -> float:
        """Bytes that a rank sends in a step."""
        return self.times * self.bytes * ROUNDS[self.kind] * (world - 1) / world


def collectives(
    parameters: Sequence[int], stage: int, accumulation: int, persistent: int = PERSISTENT, reuse: int = REUSE
) -> list[Collective]:
    """What a step sends. parameters: numbers of weights. persistent, reuse: DeepSpeed's thresholds of stage 3."""
    total = sum(parameters)
    if stage < 3:
        times = 1 if stage == 1 else accumulation
        return [
            Collective("all-reduce", "gradients", GRADIENT * total, times),
            Collective("all-gather", "weights", WEIGHT * total, 1),
        ]
    cut = sum(n for n in parameters if n > persistent)
    again = max(0, cut - reuse // 2)
    return [
        Collective("reduce-scatter", "gradients", GRADIENT * total, accumulation),
        Collective("all-gather", "weights", WEIGHT * (cut + again), accumulation),
        Collective("all-gather", "small weights", WEIGHT * (total - cut), 1),
    ]


def ring_rate(card: Card, world: int, nodes: int) -> float:
    """Bytes a second that a ring through all ranks moves at each of them.

    Raises InputError, naming it, for a rate that is needed and not known.
    """
    if world == 1:
        return math.inf
    needed = {"link_gb_per_s": card.link, "network_gb_per_s": card.network if nodes > 1 else 0.0}
    if missing := [key for key, value in needed.items() if value is None]:
        raise InputError(f"--gpu: {card.name} has no {missing[0]}, which {world} GPUs need; add it to the file")
    within = card.link
    if nodes > 1:
        within = min(within, card.network * (world // nodes))
    return SHARE * within


def seconds(sent: Sequence[Collective], card: Card, world: int, nodes: int) -> float:
    """Time of collectives, one after another."""
    if world == 1:
        return 0.0
    rate = ring_rate(card, world, nodes)
    starts = sum(one.times * max(1, math.ceil(one.bytes / (GRADIENT * BUCKET))) for one in sent)
    return sum(one.wire(world) for one in sent) / rate + starts * START * math.log2(world)
