"""AdamW and any number of weight averages in one pass over a flat shard.

With gradient g, learning rate lr, decay w, step s = 1, 2, ... (Loshchilov & Hutter, ICLR 2019, algorithm 2):

    m <- b1 m + (1 - b1) g                    v <- b2 v + (1 - b2) g^2
    p <- (1 - lr w) p - lr (m / (1 - b1^s)) / (sqrt(v / (1 - b2^s)) + eps)
    a <- d a + (1 - d) p                      for each average a with its decay d

A step whose `skip` is true leaves every tensor as it is. `step` and `skip` may live on the device, so that a
GPU never waits for the host.

Shapes: every tensor is the same flat shard [n] of fp32 state, or any one shape; `step`, `skip` and decays are 0-dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def reference(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    emas: Sequence[Tensor],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int | Tensor,
    ema_decays: Sequence[float | Tensor],
    skip: Tensor | None = None,
    bf16_out: Tensor | None = None,
) -> None:
    """The definition, in the formulas above; any floating dtype, a pass over memory for each. See `adamw_ema`."""
    keep = torch.ones((), dtype=torch.bool, device=param.device) if skip is None else ~skip
    step = torch.as_tensor(step, dtype=torch.float64, device=param.device)
    m = beta1 * exp_avg + (1.0 - beta1) * grad
    v = beta2 * exp_avg_sq + (1.0 - beta2) * grad * grad
    m_hat = m / (1.0 - beta1**step).to(m.dtype)
    v_hat = v / (1.0 - beta2**step).to(v.dtype)
    p = (1.0 - lr * weight_decay) * param - lr * m_hat / (v_hat.sqrt() + eps)
    averages = [ema + (1.0 - decay) * (p - ema) for ema, decay in zip(emas, ema_decays, strict=True)]

    state = [(exp_avg, m), (exp_avg_sq, v), (param, p), *zip(emas, averages, strict=True)]
    if bf16_out is not None:
        state.append((bf16_out, p.to(bf16_out.dtype)))
    for old, new in state:
        old.copy_(torch.where(keep, new, old))


def adamw_ema(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    emas: Sequence[Tensor],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int | Tensor,
    ema_decays: Sequence[float | Tensor],
    skip: Tensor | None = None,
    bf16_out: Tensor | None = None,
) -> None:
    """Update a shard in place.

    param, grad, exp_avg, exp_avg_sq, emas: tensors of one shape, dtype (fp32) and device. lr >= 0 per step;
    weight_decay per unit of lr (decoupled). step: number of this update, 1 for the first, int or 0-dim tensor.
    ema_decays: one per EMA, in [0, 1], float or 0-dim tensor. skip: 0-dim bool tensor; true leaves all untouched,
    even where grad is not finite. bf16_out: receives the new parameters, rounded. grad is not changed.
    Raises ValueError for shapes, dtypes or counts that do not agree.
    """
    _check(param, grad, exp_avg, exp_avg_sq, emas, ema_decays, bf16_out)
    # PyTorch's own fused kernel is one pass over these four tensors on CPU and GPU; it reads a float32 step and
    # leaves everything alone where found_inf is 1.
    torch._fused_adamw_(
        [param], [grad], [exp_avg], [exp_avg_sq], [],
        [torch.as_tensor(step, device=param.device).to(torch.float32)],
        lr=lr, beta1=beta1, beta2=beta2, weight_decay=weight_decay, eps=eps, amsgrad=False, maximize=False,
        grad_scale=None, found_inf=None if skip is None else skip.to(torch.float32),
    )  # fmt: skip
    for ema, decay in zip(emas, ema_decays, strict=True):
        ema.lerp_(param, _ema_weight(decay, skip, param))
    if bf16_out is not None:
        bf16_out.copy_(param if skip is None else torch.where(skip, bf16_out, param.to(bf16_out.dtype)))


def _ema_weight(decay: float | Tensor, skip: Tensor | None, param: Tensor) -> float | Tensor:
    """1 - decay, or 0 in a skipped step: lerp by exactly 0 returns its first operand bit for bit."""
    if skip is None and not isinstance(decay, Tensor):
        return 1.0 - decay
    weight = torch.as_tensor(1.0 - decay, dtype=param.dtype, device=param.device)
    return weight if skip is None else weight * ~skip


def _check(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    emas: Sequence[Tensor],
    ema_decays: Sequence[float | Tensor],
    bf16_out: Tensor | None,
) -> None:
    if len(emas) != len(ema_decays):
        raise ValueError(f"adamw_ema needs one decay for each EMA, got {len(emas)} EMAs and {len(ema_decays)} decays")
    for name, x in [("grad", grad), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq), *(("ema", e) for e in emas)]:
        if x.shape != param.shape or x.dtype != param.dtype:
            raise ValueError(
                f"adamw_ema: {name} is {x.dtype} {list(x.shape)}, but param is {param.dtype} {list(param.shape)}; "
                "cast or slice it to the shard first"
            )
    if bf16_out is not None and bf16_out.shape != param.shape:
        raise ValueError(f"adamw_ema: bf16_out is {list(bf16_out.shape)}, but param is {list(param.shape)}")
