"""Whole matrices out of slices, for more ranks than the tests of a run have: ranks are threads, messages are lists."""

import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pixelgen_fast import config as cfg
from pixelgen_fast import models
from pixelgen_fast.engine import cut_matrices
from pixelgen_fast.engine.cut_matrices import CutMatrices
from pixelgen_fast.engine.optimizer import Place
from pixelgen_fast.engine.run_optimizer import run_optimizer

XL = Path(__file__).parents[2] / "configs" / "pixeldit_xl_256.yaml"
SHAPES = {(6, 4): 2, (3, 5): 1, (9, 3): 3, (2, 2): 1, (4, 4): 1}  # stacked in it


class Ranks:
    """What CutMatrices asks of torch.distributed, among threads."""

    def __init__(self, world: int) -> None:
        self.world, self.own = world, threading.local()
        self.barrier, self.board = threading.Barrier(world, timeout=60), {}

    def is_initialized(self) -> bool:
        return True

    def get_world_size(self) -> int:
        return self.world

    def get_rank(self) -> int:
        return self.own.rank

    def swap(self, mine: list[Tensor]) -> list[list[Tensor]]:
        self.board[self.own.rank] = mine
        self.barrier.wait()
        everyone = [self.board[r] for r in range(self.world)]
        self.barrier.wait()
        return everyone

    def all_gather(self, out: list[Tensor], mine: Tensor) -> None:
        for place, (tensor,) in zip(out, self.swap([mine]), strict=True):
            place.copy_(tensor)

    def all_to_all_single(self, incoming: Tensor, outgoing: Tensor, sizes_in: list[int], sizes_out: list[int]) -> None:
        sent = [of_rank[self.own.rank] for of_rank in self.swap([*outgoing.split(sizes_out)])]
        assert [x.numel() for x in sent] == sizes_in
        incoming.copy_(torch.cat(sent))


def slices(stacked: dict[nn.Parameter, int], world: int, rank: int) -> tuple[Tensor, dict[nn.Parameter, Place]]:
    """A rank's slice of the parameters, one after another, and where they lie in it."""
    flat = torch.cat([p.detach().flatten() for p in stacked])
    size = -(-len(flat) // world)
    own, places, begin = flat[rank * size : (rank + 1) * size].clone(), {}, 0
    for p in stacked:
        first = min(max(begin, rank * size), begin + p.numel())
        last = max(min(begin + p.numel(), (rank + 1) * size), first)
        places[p] = Place(own, max(begin - rank * size, 0), first - begin, last - first)
        begin += p.numel()
    return own, places


@pytest.mark.parametrize("world", [2, 3, 5, 11])  # with 11, a matrix lies with up to three
def test_every_matrix_is_seen_whole_once_and_comes_back(world, monkeypatch):
    ranks, seen = Ranks(world), []
    monkeypatch.setattr(cut_matrices, "dist", ranks)
    generator = torch.Generator().manual_seed(world)
    stacked = {nn.Parameter(torch.randn(shape, generator=generator)): n for shape, n in SHAPES.items()}

    def function(x: Tensor) -> Tensor:
        """Of a matrix as a whole: every element needs every other one."""
        seen.extend(x)
        return x.flip(1, 2) + x.sum((1, 2), keepdim=True)

    def of_rank(rank: int) -> tuple[Tensor, int]:
        ranks.own.rank = rank
        own, places = slices(stacked, world, rank)
        cut = CutMatrices(stacked, places)
        cut.map_({own: own}, function, torch.float32)
        return own, cut.exchanged

    with ThreadPoolExecutor(world) as pool:
        found = list(pool.map(of_rank, range(world)))
    parts = [part for p, n in stacked.items() for part in p.detach().chunk(n)]
    wanted = torch.cat([(part.flip(0, 1) + part.sum()).flatten() for part in parts])
    assert torch.allclose(torch.cat([own for own, _ in found]), wanted, atol=1e-5)
    assert len(seen) == len(parts)
    assert all(sum(torch.equal(part, x) for x in seen) == 1 for part in parts)
    assert len({exchanged for _, exchanged in found}) == 1 and found[0][1] > 0


def test_alike_matrices_go_through_one_product_up_to_a_size(monkeypatch):
    monkeypatch.setattr(CutMatrices, "LARGEST", 24)
    p = nn.Parameter(torch.zeros(20, 3))  # five of 4 x 3
    sizes = []
    CutMatrices({p: 5}, {p: Place(p, 0, 0, 60)}).map_(
        {p: p.detach().view(-1)}, lambda x: (sizes.append(len(x)), x)[1], p.dtype
    )
    assert sizes == [2, 2, 1]


def test_ranks_that_do_not_hold_a_matrix_are_an_error():
    p = nn.Parameter(torch.zeros(4, 3))
    with pytest.raises(ValueError, match=r"the ranks have 11 of the 12 elements of a matrix \(4, 3\)"):
        CutMatrices({p: 1}, {p: Place(p, 0, 0, 11)})


@pytest.mark.parametrize(("world", "wanted"), [(4, 3_108_864), (64, 48_150_272)])
def test_what_a_step_of_the_largest_model_exchanges(world, wanted, monkeypatch):
    """PixelDiT-XL: three of 214 matrices are cut by four ranks, where gathering would take 473 M numbers to each."""
    config = cfg.load(XL, ["optimizer.name=muon"], models.model_schema)
    with torch.device("meta"):
        stacked = run_optimizer(config.optimizer, models.build_model(config, 1000), None).param_groups[0]["stacked"]
    assert (sum(stacked.values()), sum(p.numel() for p in stacked)) == (214, 473_047_040)
    ends = [473_047_040 * r // world for r in range(world + 1)]
    spans, begin = [], 0
    for p in stacked:
        cuts = [min(max(end - begin, 0), p.numel()) for end in ends]
        spans.append([(first, last - first) for first, last in pairwise(cuts)])
        begin += p.numel()
    ranks = Ranks(world)
    ranks.own.rank = 0
    monkeypatch.setattr(cut_matrices, "dist", ranks)
    monkeypatch.setattr(CutMatrices, "_spans", lambda self, pieces: spans)
    places = {p: Place(p, 0, *of_ranks[0]) for p, of_ranks in zip(stacked, spans, strict=True)}
    assert CutMatrices(stacked, places).exchanged == wanted
