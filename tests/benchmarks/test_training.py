"""The training step under test is the trainer's: with DeepSpeed or without it, the numbers are the same."""

import pytest
import torch
import training
from gpu.plan import TINY, B


def made(monkeypatch, engine, device="cpu"):
    if engine == "plain":
        monkeypatch.setattr(training, "zero", None)
    torch.manual_seed(0)
    return training.Training(training.load_config(B, 2, *TINY), device, "reference")


def numbers(step):
    found = []
    for _ in range(3):
        step.step()
        found.append((float(step.loss.detach()), float(step.engine.grad_norm)))
    return found


def test_the_plain_engine_stands_for_deepspeed(monkeypatch):
    deepspeed = made(monkeypatch, "deepspeed")
    expected = numbers(deepspeed)
    plain = made(monkeypatch, "plain")
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


def test_bf16_weights_follow_float32_masters(monkeypatch):
    step = made(monkeypatch, "plain")
    optimizer = training.run_optimizer(step.config.optimizer, step.module.model, None)
    first = {name: p.detach().clone() for name, p in step.module.named_parameters()}
    engine = training.PlainEngine(step.module, optimizer, "bf16")
    engine.backward(engine(step.images, step.labels, step.numbers))
    engine.step()
    for (name, weight), (_, master) in zip(step.module.named_parameters(), engine.masters, strict=True):
        assert (weight.dtype, master.dtype) == (torch.bfloat16, torch.float32)
        assert torch.equal(weight, master.bfloat16())
        # AdamW's first step moves a weight by the learning rate, or by less where its gradient is as small as eps
        moved = float((master.detach() - first[name]).abs().max())
        assert 0.0 < moved / step.config.optimizer.lr < 1.01
        assert weight.grad is None
