"""The training step under test is the trainer's: with DeepSpeed or without it, the numbers are the same."""

import pytest
import torch
import training
from gpu.plan import TINY, B


def made(monkeypatch, engine, device="cpu", optimizer="adamw"):
    if engine == "plain":
        monkeypatch.setattr(training, "zero", None)
    torch.manual_seed(0)
    return training.Training(training.load_config(B, 2, *TINY, f"optimizer.name={optimizer}"), device, "reference")


def numbers(step):
    found = []
    for _ in range(3):
        step.step()
        found.append((float(step.loss.detach()), float(step.engine.grad_norm)))
    return found


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_plain_engine_stands_for_deepspeed(monkeypatch, optimizer):
    deepspeed = made(monkeypatch, "deepspeed", optimizer=optimizer)
    expected = numbers(deepspeed)
    plain = made(monkeypatch, "plain", optimizer=optimizer)
    assert (deepspeed.engine_name, plain.engine_name) == ("deepspeed", "plain")
    assert numbers(plain) == expected


def test_no_weight_is_zero_and_every_gradient_has_a_norm(monkeypatch):
    step = made(monkeypatch, "plain")
    assert all(p.any() for p in step.module.parameters())
    with step.gradient_norms() as norms:
        step.step()
    assert norms.keys() == dict(step.module.named_parameters()).keys()
    total = torch.stack([*norms.values()]).norm()
    assert float(total) == pytest.approx(float(step.engine.grad_norm), rel=1e-5)
    before = dict(norms)
    step.step()  # nobody watches any more
    assert norms == before


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_bf16_weights_follow_float32_masters(monkeypatch, name):
    step = made(monkeypatch, "plain", optimizer=name)
    optimizer = training.run_optimizer(step.config.optimizer, step.module.model, None)
    first = {key: p.detach().clone() for key, p in step.module.named_parameters()}
    engine = training.PlainEngine(step.module, optimizer, "bf16")
    engine.backward(engine(step.images, step.labels, step.numbers))
    engine.step()
    masters = dict(engine.masters)
    for key, weight in step.module.named_parameters():
        master = masters[weight]
        assert (weight.dtype, master.dtype) == (torch.bfloat16, torch.float32)
        assert torch.equal(weight, master.bfloat16())
        # AdamW's first step moves a weight by the learning rate, or by less where its gradient is as small as eps,
        # Muon's a matrix by 0.2 times that, in the mean of its squares
        moved = float((master.detach() - first[key]).abs().max())
        assert 0.0 < moved / step.config.optimizer.lr < (1.01 if name == "adamw" else 2.0)
        assert weight.grad is None
