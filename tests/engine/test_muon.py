"""Muon: its iteration against the singular values, its steps against float64, on shards that cut the matrices."""

import math

import pytest
import torch
from support.golden import relative
from torch import Tensor, nn

from pixelgen_fast.engine.muon import Muon, newton_schulz, update_scale

TOLERANCE = 1e-5
BAND = (0.68, 1.14)  # of singular values that begin between 0.01 and 1, after five steps


def polynomial(x: Tensor, steps: int) -> Tensor:
    """What the iteration does to singular values."""
    for _ in range(steps):
        x = 3.4445 * x - 4.7750 * x**3 + 2.0315 * x**5
    return x


def orthogonalised(u: Tensor, steps: int = 5) -> Tensor:
    """The same by a singular value decomposition, in float64."""
    left, values, right = torch.linalg.svd(u.double(), full_matrices=False)
    return left @ torch.diag(polynomial(values / values.norm(), steps)) @ right


def matrix(rows: int, columns: int, smallest: float) -> Tensor:
    """float64, Frobenius norm 1; singular values in even steps of their logarithm, their ratio `smallest`."""
    generator = torch.Generator().manual_seed(rows)
    n = min(rows, columns)
    left, right = (
        torch.linalg.qr(torch.randn(size, n, generator=generator, dtype=torch.float64))[0] for size in (rows, columns)
    )
    values = torch.logspace(0, math.log10(smallest), n, dtype=torch.float64)
    return left @ torch.diag(values / values.norm()) @ right.T


@pytest.mark.parametrize(("rows", "columns"), [(6, 6), (5, 12), (12, 5)])
def test_the_iteration_brings_all_singular_values_near_one(rows, columns):
    u = matrix(rows, columns, smallest=0.03)
    found = newton_schulz(u[None].float() * 1e-5)[0]  # of any length
    left, values, right = torch.linalg.svd(u, full_matrices=False)
    assert values.min() > 0.01
    inside = left.T @ found.double() @ right.T  # diagonal where found has the singular vectors of u
    scaled = inside.diagonal()
    assert BAND[0] <= scaled.min() and scaled.max() <= BAND[1]
    assert (inside - torch.diag(scaled)).norm() < 1e-4
    assert (scaled - polynomial(values, 5)).norm() < 1e-4
    assert (found.double() - left @ right).norm() / math.sqrt(min(rows, columns)) < 0.32  # from U V^T


def test_the_band_is_that_of_the_polynomial():
    values = polynomial(torch.linspace(0.01, 1, 100_000, dtype=torch.float64), 5)
    assert BAND[0] < values.min() and values.max() < BAND[1]


def test_matrices_of_a_stack_do_not_meet_and_zeros_stay():
    stack = torch.stack([matrix(4, 7, 0.1), 100 * matrix(4, 7, 0.02), torch.zeros(4, 7, dtype=torch.float64)])
    found = newton_schulz(stack)
    for one, u in zip(found[:2], stack, strict=False):
        assert relative(one, orthogonalised(u)) < 1e-12
    assert torch.equal(found[2], stack[2])


def test_scales():
    assert update_scale(8, 18, "match_rms_adamw") == update_scale(18, 8, "match_rms_adamw") == 0.2 * math.sqrt(18)
    assert update_scale(18, 8, "original") == 1.5 and update_scale(8, 18, "original") == 1.0


def by_hand(worker, model: nn.Module, scale: str, steps: int) -> tuple[dict[str, dict[str, Tensor]], float]:
    """The worker's training in float64, on the whole batch, every matrix by itself: state, and the last norm."""
    model = model.double()
    stacked = {name: model.matrices().get(p, 0) for name, p in model.named_parameters()}
    zeros = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    kinds = {name: ["momentum"] if n else ["exp_avg", "exp_avg_sq"] for name, n in stacked.items()}
    state = {name: dict.fromkeys(kinds[name], zero) for name, zero in zeros.items()}
    for name, p in model.named_parameters():
        state[name] |= {f"ema_{d}": p.detach().clone() for d in worker.DECAYS}
    for step in range(1, steps + 1):
        x, y = (tensor.double() for tensor in worker.batch(step - 1))
        grads = torch.autograd.grad((model(x) - y).square().mean(), [*model.parameters()])
        norm = torch.sqrt(sum(g.square().sum() for g in grads)).item()
        for (name, p), g in zip(model.named_parameters(), grads, strict=True):
            s, g = state[name], g * min(1.0, worker.CLIP / norm)
            if stacked[name]:
                s["momentum"] = worker.MOMENTUM * s["momentum"] + (1 - worker.MOMENTUM) * g
                u = (1 - worker.MOMENTUM) * g + worker.MOMENTUM * s["momentum"]
                parts = [update_scale(*part.shape, scale) * orthogonalised(part) for part in u.chunk(stacked[name])]
                change = 2 * worker.LR * (torch.cat(parts) + 0.1 * p)
            else:
                s["exp_avg"] = 0.9 * s["exp_avg"] + 0.1 * g
                s["exp_avg_sq"] = 0.95 * s["exp_avg_sq"] + 0.05 * g * g
                root = (s["exp_avg_sq"] / (1 - 0.95**step)).sqrt() + 1e-8
                change = worker.LR * s["exp_avg"] / (1 - 0.9**step) / root
            p.data -= change.detach()
            for d in worker.DECAYS:
                s[f"ema_{d}"] = d * s[f"ema_{d}"] + (1 - d) * p.detach()
    return {name: state[name] | {"master": p.detach()} for name, p in model.named_parameters()}, norm


def assert_close(found: dict, wanted: dict, tolerance: float = TOLERANCE) -> None:
    assert found.keys() == wanted.keys()
    for name, kinds in wanted.items():
        assert found[name].keys() == kinds.keys()
        for kind, want in kinds.items():
            assert relative(found[name][kind], want) < tolerance, f"{kind} of {name}"


@pytest.mark.parametrize("scale", ["match_rms_adamw", "original"])
def test_steps_of_one_process_follow_the_formulas(worker, scale):
    model = worker.Mixer()
    optimizer = worker.mixer_optimizer(model, scale)
    optimizer.set_lr(worker.LR)
    for step in range(worker.MUON_STEPS):
        x, y = worker.batch(step)
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
    found = {name: {**optimizer.state[p], "master": p.detach()} for name, p in model.named_parameters()}
    assert_close(found, by_hand(worker, worker.Mixer(), scale, worker.MUON_STEPS)[0])


def test_a_bad_gradient_is_as_if_it_had_not_been(worker):
    model = worker.Mixer()
    optimizer = worker.mixer_optimizer(model)
    for bad in (1.0, float("nan"), float("inf")):
        before = [p.detach().clone() for p in model.parameters()]
        momenta = {p: optimizer.state[p]["momentum"].clone() for p in model.matrices() if optimizer.state[p]}
        optimizer.zero_grad()
        (model(worker.batch(0)[0]).square().mean() * bad).backward()
        optimizer.step()
        moved = [not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)]
        assert all(moved) if bad == 1.0 else not any(moved)
        assert all(torch.equal(optimizer.state[p]["momentum"], momentum) for p, momentum in momenta.items())
    assert optimizer.scalars() == {"step": 1, "skipped": 2, "skipped_in_a_row": 2}


@pytest.fixture(scope="module")
def found(launch, tmp_path_factory) -> dict[int, dict]:
    folder = tmp_path_factory.mktemp("muon")
    for world in (1, 2):
        launch("muon", world, folder)
    launch("muon_moved", 2, folder)
    runs = {world: torch.load(folder / f"muon-{world}.pt") for world in (1, 2)}
    return runs | {"moved": torch.load(folder / "muon_moved-2.pt")}


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("run", range(4))
def test_weights_are_the_same_at_every_stage_world_size_and_accumulation(worker, found, world, run):
    stage, wide_first, accumulation = worker.MUON_RUNS[run]
    result = found[world][stage, wide_first, accumulation]
    wanted, norm = by_hand(worker, worker.Mixer(), "match_rms_adamw", worker.MUON_STEPS)
    assert_close(result["state"], wanted)
    assert norm > worker.CLIP, "or clipping is not tested"
    if world == 2:  # of 36 elements 17, or of 9 one
        assert result["cut"] == (1 if wide_first else 17)


@pytest.mark.parametrize("world", [1, 2])
def test_a_bad_gradient_on_one_rank_skips_the_step_on_all(worker, found, world):
    for run in worker.MUON_RUNS:
        assert found[world][run]["untouched"]
        assert found[world][run]["scalars"] == {"step": worker.MUON_STEPS, "skipped": 1, "skipped_in_a_row": 1}


@pytest.mark.parametrize("world", [1, 2])
def test_bf16(found, world):
    for run in found[world]["bf16"].values():
        assert run["untouched"] and run["moved"] and run["follows"] and run["finite"]


@pytest.mark.parametrize("source", [1, 2])
def test_a_checkpoint_moves_between_ranks_and_stages(worker, found, source):
    for run in worker.MUON_RUNS[:2]:
        moved, origin = found["moved"][source, *run], found[source][run]
        assert_close(moved["state"], origin["state"], 1e-30)
        assert_close(moved["next"], origin["next"])


def test_stage_3_is_refused(worker):
    model = worker.Mixer()
    with pytest.raises(ValueError, match=r"Muon works at ZeRO stages \(1, 2\), got 3"):
        worker.ZeroEngine(model, worker.mixer_optimizer(model), stage=3, micro_batch=1)


def test_matrices_in_two_groups_are_refused(worker):
    a, b = worker.Mixer(), worker.Mixer()
    with pytest.raises(ValueError):
        Muon([{"params": [*m.matrices()], "stacked": m.matrices()} for m in (a, b)])
