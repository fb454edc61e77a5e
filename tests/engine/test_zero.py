"""ZeRO 1, 2 and 3 on one rank and on two against the same training in float64; steps that must not happen."""

import copy

import pytest
import torch
from torch import Tensor

TOLERANCE = 1e-5
RUNS = [(world, stage) for world in (1, 2) for stage in (1, 2, 3)]


@pytest.fixture(scope="module")
def found(launch, tmp_path_factory) -> dict[int, dict]:
    folder = tmp_path_factory.mktemp("zero")
    for world in (1, 2):
        launch("stages", world, folder)
    return {world: torch.load(folder / f"stages-{world}.pt") for world in (1, 2)}


@pytest.fixture(scope="module")
def expected(worker) -> dict:
    """The same steps on the whole batch in float64."""
    return by_hand(worker, worker.net(torch.float64), worker.STEPS)


def by_hand(worker, net, steps: int, computed_in: torch.dtype = torch.float64) -> dict:
    """AdamW, clipping and averages written out in float64; the gradients are those of weights rounded to a type."""
    params = {name: p for name, p in net.named_parameters() if p.requires_grad}
    state = {name: {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)} for name, p in params.items()}
    for name, p in params.items():
        state[name] |= {} if name.startswith("projector") else {f"ema_{d}": p.detach().clone() for d in worker.DECAYS}
    losses = []
    for step in range(steps):
        x, y = worker.batch(step)
        rounded = copy.deepcopy(net).to(computed_in)
        wide = torch.promote_types(computed_in, torch.float32)
        loss = (rounded(x.to(computed_in)).to(wide) - y.to(wide)).square().mean()
        of = dict(rounded.named_parameters())
        grads = torch.autograd.grad(loss, [of[name] for name in params])
        grads = {name: g.double() for name, g in zip(params, grads, strict=True)}
        norm = torch.sqrt(sum(g.square().sum() for g in grads.values()))
        losses.append(loss.item())
        for name, p in params.items():
            g, s = grads[name] * min(1.0, worker.CLIP / norm), state[name]
            s["exp_avg"] = 0.9 * s["exp_avg"] + 0.1 * g
            s["exp_avg_sq"] = 0.95 * s["exp_avg_sq"] + 0.05 * g * g
            m_hat, v_hat = s["exp_avg"] / (1 - 0.9 ** (step + 1)), s["exp_avg_sq"] / (1 - 0.95 ** (step + 1))
            direction = m_hat / (v_hat.sqrt() + 1e-8)
            weight_decay = 0.0 if name.startswith("projector") else 0.1
            with torch.no_grad():
                p -= worker.LR * (direction + weight_decay * p)
            for key in s:
                if key.startswith("ema_"):
                    decay = float(key.removeprefix("ema_"))
                    s[key] = decay * s[key] + (1 - decay) * p.detach()
    return dict(
        losses=losses, norm=norm.item(), state={n: s | {"master": params[n].detach()} for n, s in state.items()}
    )


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


@pytest.mark.parametrize(("world", "stage"), RUNS)
def test_twenty_steps_are_the_same_at_every_stage_and_world_size(worker, found, expected, world, stage):
    run = found[world][stage]
    assert error(run["losses"], torch.tensor(expected["losses"])) < TOLERANCE
    assert abs(run["norm"] / expected["norm"] - 1) < TOLERANCE
    assert run["norm"] > worker.CLIP, "the last step must have been clipped, or clipping is not tested"
    assert run["state"].keys() == expected["state"].keys()
    for name, kinds in expected["state"].items():
        assert run["state"][name].keys() == kinds.keys()
        for kind, want in kinds.items():
            assert error(run["state"][name][kind], want) < TOLERANCE, f"{kind} of {name}"


def test_one_bf16_rank_keeps_float32_masters(worker, found):
    """Forward and backward are the bf16 module's; everything behind them is float32, and follows float64."""
    run, start = found[1]["masters"], worker.net().bfloat16()
    for name, p in start.named_parameters():
        if p.requires_grad:
            assert torch.equal(run["start"][name]["master"], p.float())
    expected = by_hand(worker, start.double(), 5, torch.bfloat16)
    assert abs(run["norm"] / expected["norm"] - 1) < TOLERANCE
    assert run["norm"] > worker.CLIP
    for name, kinds in expected["state"].items():
        assert run["state"][name].keys() == kinds.keys()
        for kind, want in kinds.items():
            assert error(run["state"][name][kind], want) < TOLERANCE, f"{kind} of {name}"
    assert run["follows"] and run["untouched"]
    assert run["skipped"] == {"step": 5, "skipped": 1, "skipped_in_a_row": 1}
    assert not any(run["rows_begin"]), "weights begin at multiples of 32 bytes"


@pytest.mark.parametrize(("world", "stage"), RUNS)
def test_before_the_first_step_the_state_is_there(worker, found, world, stage):
    for name, p in worker.net().named_parameters():
        if p.requires_grad:
            start = found[world][stage]["start"][name]
            averages = [start[key] for key in start if key.startswith("ema_")]
            assert len(averages) == (0 if name.startswith("projector") else len(worker.DECAYS))
            assert all(torch.equal(tensor, p) for tensor in [start["master"], *averages])
            assert not start["exp_avg"].any() and not start["exp_avg_sq"].any()


@pytest.mark.parametrize(("world", "stage"), RUNS)
def test_a_bad_gradient_on_one_rank_skips_the_step_on_all(worker, found, world, stage):
    run = found[world][stage]
    assert run["untouched"]
    assert run["skipped"] == {"step": worker.STEPS, "skipped": 2, "skipped_in_a_row": 2}
    assert run["moved"], "training goes on after it"
    assert run["later"] == {"step": worker.STEPS + 1, "skipped": 2, "skipped_in_a_row": 0}
    assert run["in_a_row"] == 0


@pytest.mark.parametrize(("stage", "accumulation"), [(1, "fp32"), (1, "bf16"), (2, "fp32"), (3, "fp32")])
def test_a_bad_gradient_in_bf16(found, stage, accumulation):
    run = found[2]["bf16"][stage, accumulation]
    assert run["untouched"] and run["finite"] and run["moved"] and run["follows"]
    assert run["counters"] == {"step": 3, "skipped": 2, "skipped_in_a_row": 2}
    ours = (stage, accumulation) in [(1, "bf16"), (2, "fp32")]
    assert run["skipped_by_deepspeed"] == (0 if ours else 2), "both ways of skipping must be tested here"


@pytest.mark.parametrize(("world", "stage"), RUNS)
def test_borrowed_weights_are_complete(worker, found, world, stage):
    run, net = found[world][stage], worker.net()
    assert run["follows"], "the module computes with the master weights"
    net.load_state_dict(run["weights"])
    assert torch.equal(net.frozen, worker.net().frozen) and torch.equal(net.shift, worker.net().shift)
    assert run["only_first"] == len(net.state_dict())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(stage=0), "ZeRO stage must be 1, 2 or 3, got 0"),
        (dict(dtype="fp16"), "each is one of"),
        (dict(communication_dtype="bf16"), "an fp32 run has all three in fp32"),
        (dict(micro_batch=0), "micro_batch and accumulation must be at least 1"),
    ],
)
def test_values_that_do_not_exist_are_refused(worker, wrong, message):
    optimizer = worker.AdamWEMA([p for p in worker.net().parameters() if p.requires_grad])
    with pytest.raises(ValueError, match=message):
        worker.ZeroEngine(worker.net(), optimizer, **({"stage": 1, "micro_batch": 1} | wrong))


def test_the_optimizer_must_have_every_trained_parameter(worker):
    net = worker.net()
    optimizer = worker.AdamWEMA([p for name, p in net.named_parameters() if name.startswith("first")])
    with pytest.raises(ValueError, match=r"not in the optimizer: \['gain', 'second.weight'"):
        worker.ZeroEngine(net, optimizer, stage=1, micro_batch=1)
