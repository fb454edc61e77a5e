"""One AdamW + EMA pass against the published formulas in numpy float64, and its skip against 'nothing happened'."""

import numpy as np
import pytest
import torch
from pixelgen_kernels import adamw_ema as op
from torch import Tensor

HYPER = dict(lr=3e-3, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)
DECAYS = [0.5, 0.999]


def shard(size: int, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(size)
    x = {k: torch.randn(size, generator=generator, dtype=dtype) for k in ("param", "grad", "exp_avg", "ema_a", "ema_b")}
    x["exp_avg_sq"] = torch.rand(size, generator=generator, dtype=dtype)
    return x


def update(body, x: dict[str, Tensor], **more) -> None:
    args = dict(HYPER, step=7, ema_decays=DECAYS, **more)
    body(x["param"], x["grad"], x["exp_avg"], x["exp_avg_sq"], [x["ema_a"], x["ema_b"]], **args)


def by_hand(x: dict[str, Tensor], step: int) -> dict[str, np.ndarray]:
    """Loshchilov & Hutter, algorithm 2, lines 5 to 12, then the averages."""
    p, g, m, v, a, b = (x[k].double().numpy() for k in ("param", "grad", "exp_avg", "exp_avg_sq", "ema_a", "ema_b"))
    m = 0.9 * m + 0.1 * g
    v = 0.95 * v + 0.05 * g**2
    p = p - 3e-3 * (m / (1 - 0.9**step) / (np.sqrt(v / (1 - 0.95**step)) + 1e-8) + 0.1 * p)
    return dict(param=p, exp_avg=m, exp_avg_sq=v, ema_a=0.5 * a + 0.5 * p, ema_b=0.999 * b + 0.001 * p)


@pytest.mark.parametrize("body", [op.reference, op.adamw_ema], ids=["reference", "adamw_ema"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 3e-7)], ids=["f64", "f32"])
@pytest.mark.parametrize("size", [1, 63, 1021])
@pytest.mark.parametrize("device_step", [False, True], ids=["int", "tensor"])
def test_follows_the_formulas(body, dtype, tolerance, size, device_step):
    x = shard(size, dtype)
    grad, expected = x["grad"].clone(), by_hand(x, 7)
    args = dict(HYPER, step=torch.tensor(7) if device_step else 7, ema_decays=DECAYS)
    body(x["param"], x["grad"], x["exp_avg"], x["exp_avg_sq"], [x["ema_a"], x["ema_b"]], **args)
    for name, want in expected.items():
        error = np.linalg.norm(x[name].double().numpy() - want) / np.linalg.norm(want)
        assert error < tolerance, f"{name}: relative error {error}"
    assert torch.equal(x["grad"], grad)


@pytest.mark.parametrize("body", [op.reference, op.adamw_ema], ids=["reference", "adamw_ema"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_skipped_step_changes_no_bit(body, bad):
    x = shard(63, torch.float32)
    x["grad"][5] = bad
    out = torch.randn(63).bfloat16()
    before = {name: tensor.clone() for name, tensor in x.items()} | {"out": out.clone()}
    update(body, x, skip=torch.tensor(True), bf16_out=out)
    x["grad"], before["grad"] = torch.zeros(1), torch.zeros(1)
    assert all(torch.equal(x.get(name, out), tensor) for name, tensor in before.items())


@pytest.mark.parametrize("body", [op.reference, op.adamw_ema], ids=["reference", "adamw_ema"])
def test_a_step_that_is_not_skipped_is_the_same_as_one_without_skip(body):
    x, y, out = shard(63, torch.float32), shard(63, torch.float32), torch.zeros(63, dtype=torch.bfloat16)
    update(body, x)
    update(body, y, skip=torch.tensor(False), bf16_out=out)
    assert all(torch.equal(x[name], y[name]) for name in x)
    assert torch.equal(out, y["param"].bfloat16())


def test_what_does_not_fit_is_refused_before_anything_changes():
    x = shard(63, torch.float32)
    before = x["param"].clone()
    with pytest.raises(ValueError, match=r"grad is torch.float64 \[63\], but param is torch.float32"):
        update(op.adamw_ema, x | {"grad": x["grad"].double()})
    with pytest.raises(ValueError, match=r"ema is torch.float32 \[62\]"):
        update(op.adamw_ema, x | {"ema_b": x["ema_b"][:62]})
    with pytest.raises(ValueError, match="1 EMAs and 2 decays"):
        tensors = (x["param"], x["grad"], x["exp_avg"], x["exp_avg_sq"], [x["ema_a"]])
        op.adamw_ema(*tensors, step=1, ema_decays=DECAYS, **HYPER)
    with pytest.raises(ValueError, match=r"bf16_out is \[1\]"):
        update(op.adamw_ema, x, bf16_out=torch.zeros(1))
    assert torch.equal(x["param"], before)
