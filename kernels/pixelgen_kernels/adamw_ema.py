"""AdamW and any number of weight averages in one pass over a flat shard, or over a list of parameters.

With gradient g = grad_scale * grad, learning rate lr, decay w, step s = 1, 2, ... (Loshchilov & Hutter, ICLR 2019,
algorithm 2); grad_scale is what clips the gradient, at no pass of its own:

    m <- b1 m + (1 - b1) g                    v <- b2 v + (1 - b2) g^2
    p <- (1 - lr w) p - lr (m / (1 - b1^s)) / (sqrt(v / (1 - b2^s)) + eps)
    a <- d a + (1 - d) p                      for each average a with its decay d

A step whose `skip` is true leaves every tensor as it is. `step`, `skip` and `grad_scale` may live on the device, so
that a GPU never waits for the host.

The kernel reads and writes every stream once, 16 bytes a thread at a time: 16 + 8 a bytes in, 12 + 4 a out, 2 more
for the bf16 copy, a the number of averages. The corrections 1 - b^s = -expm1(s log b) are taken on the device.

Shapes: every tensor is the same flat shard [n] of fp32 state, or any one shape; `step`, `skip` and decays are 0-dim.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pixelgen_kernels.bodies import body
from pixelgen_kernels.launch import Launch
from pixelgen_kernels.registration import operator
from pixelgen_kernels.tuning import chosen

MOST_EMAS = 4
# Triton makes accesses 16 bytes wide where it knows that their number is a multiple of this; a shard's rarely is one.
WIDE = 16


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
    grad_scale: float | Tensor = 1.0,
    bf16_out: Tensor | None = None,
) -> None:
    """The definition, in the formulas above; any floating dtype, a pass over memory for each. See `adamw_ema`."""
    grad = grad * grad_scale
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


class Config(NamedTuple):
    """A program updates `block` consecutive elements."""

    block: int
    num_warps: int


CONFIGS = (Config(1024, 4), Config(2048, 8), Config(2048, 4), Config(512, 4))


@triton.jit
def _one_minus_exp(x):
    """1 - exp(x) for x <= 0 to float32 rounding: its series where the difference would cancel."""
    series = 1.0 + x / 8.0
    for i in tl.static_range(7, 1, -1):
        series = 1.0 + x / i * series
    return tl.where(x > -0.5, -x * series, 1.0 - tl.exp(x))


@triton.jit
def _average(ema_ptr, decay_ptr, offset, mask, param):
    ema = tl.load(ema_ptr + offset, mask=mask)
    tl.store(ema_ptr + offset, ema + (1.0 - tl.load(decay_ptr)) * (param - ema), mask=mask)


@triton.jit
def adamw_ema_kernel(
    param_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, bf16_ptr,
    ema0_ptr, ema1_ptr, ema2_ptr, ema3_ptr, decay0_ptr, decay1_ptr, decay2_ptr, decay3_ptr, step_ptr, skip_ptr,
    grad_scale_ptr, N, lr, beta1, one_minus_beta1, log_beta1, beta2, one_minus_beta2, log_beta2, eps, keep_weight,
    EMAS: tl.constexpr, BF16: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = (offset < N) & (tl.load(skip_ptr) == 0)
    step = tl.load(step_ptr)
    g = tl.load(grad_scale_ptr) * tl.load(grad_ptr + offset, mask=mask).to(tl.float32)
    m = beta1 * tl.load(exp_avg_ptr + offset, mask=mask) + one_minus_beta1 * g
    v = beta2 * tl.load(exp_avg_sq_ptr + offset, mask=mask) + one_minus_beta2 * g * g
    tl.store(exp_avg_ptr + offset, m, mask=mask)
    tl.store(exp_avg_sq_ptr + offset, v, mask=mask)

    rate = lr / _one_minus_exp(step * log_beta1)
    denominator = tl.sqrt(v / _one_minus_exp(step * log_beta2)) + eps
    p = keep_weight * tl.load(param_ptr + offset, mask=mask) - rate * m / denominator
    tl.store(param_ptr + offset, p, mask=mask)
    if BF16:
        tl.store(bf16_ptr + offset, p.to(bf16_ptr.dtype.element_ty), mask=mask)
    if EMAS > 0:
        _average(ema0_ptr, decay0_ptr, offset, mask, p)
    if EMAS > 1:
        _average(ema1_ptr, decay1_ptr, offset, mask, p)
    if EMAS > 2:
        _average(ema2_ptr, decay2_ptr, offset, mask, p)
    if EMAS > 3:
        _average(ema3_ptr, decay3_ptr, offset, mask, p)


@functools.cache
def plan(N: int, averages: int, grad_bytes: int, copied: bool, tail: bool, config: Config) -> Launch:
    """The launch over N elements. grad_bytes: of one number of the gradient. copied: to bf16 as well. tail: of a shard,
    the elements behind the last multiple of WIDE."""
    return Launch(
        name="adamw_ema_fwd" + tail * "_tail",
        kernel=adamw_ema_kernel,
        grid=triton.cdiv(N, config.block),
        constants={"EMAS": averages, "BF16": copied, "BLOCK": config.block},
        num_warps=config.num_warps,
        num_stages=1,
        bytes_moved=(grad_bytes + 2 * 4 * (3 + averages) + 2 * copied) * N,
        rows=N,
        widest=32 if tail else 128,
    )


def _fake(*_: object) -> None:
    return None


@operator("adamw_ema", _fake, mutates=("param", "exp_avg", "exp_avg_sq", "emas", "bf16_out"))
def adamw_ema_update(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    emas: Sequence[Tensor],
    decays: Sequence[Tensor],
    step: Tensor,
    skip: Tensor,
    grad_scale: Tensor,
    bf16_out: Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """decays, step, grad_scale: float32 0-dim tensors on the shard's device; skip: bool."""
    # An unused pointer must still be a pointer; the kernel does not touch it.
    streams = [param, grad, exp_avg, exp_avg_sq, param if bf16_out is None else bf16_out]
    streams += [*emas, *[param] * (MOST_EMAS - len(emas))]
    scalars = [*decays, *[step] * (MOST_EMAS - len(decays)), step, skip, grad_scale]
    numbers = (
        lr, beta1, 1.0 - beta1, _log(beta1), beta2, 1.0 - beta2, _log(beta2), eps, 1.0 - lr * weight_decay
    )  # fmt: skip
    kind = (len(emas), grad.element_size(), bf16_out is not None)
    config, N = chosen("adamw_ema", CONFIGS), param.numel()
    whole = N - N % WIDE
    plan(whole, *kind, False, config).start(*streams, *scalars, whole, *numbers)
    if whole < N:
        rest = [x.view(-1)[whole:] for x in streams]
        plan(N - whole, *kind, True, config).start(*rest, *scalars, N - whole, *numbers)


def _log(beta: float) -> float:
    return math.log(beta) if beta > 0.0 else -math.inf


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
    grad_scale: float | Tensor = 1.0,
    bf16_out: Tensor | None = None,
) -> None:
    """Update a shard in place.

    param, grad, exp_avg, exp_avg_sq, emas: tensors of one shape, dtype (fp32) and device. lr >= 0 per step;
    weight_decay per unit of lr (decoupled). step: number of this update, 1 for the first, int or 0-dim tensor.
    ema_decays: one per EMA, in [0, 1], float or 0-dim tensor. skip: 0-dim bool tensor; true leaves all untouched,
    even where grad is not finite. grad_scale: factor of the gradient, float or 0-dim tensor. bf16_out: receives the new
    parameters, rounded. grad is not changed. Raises ValueError for shapes, dtypes or counts that do not agree.
    """
    _check(param, grad, exp_avg, exp_avg_sq, emas, ema_decays, bf16_out)
    chosen_body = body(param)
    if chosen_body != "reference":
        _check_kernel(param, grad, exp_avg, exp_avg_sq, emas, bf16_out)
        adamw_ema_update(
            param, grad, exp_avg, exp_avg_sq, list(emas), [_scalar(d, param) for d in ema_decays],
            *_scalars(param, step, skip, grad_scale), bf16_out, lr, beta1, beta2, eps, weight_decay, body=chosen_body,
        )  # fmt: skip
        return
    scaled = grad if isinstance(grad_scale, float) and grad_scale == 1.0 else grad * grad_scale
    # PyTorch's own fused kernel is one pass over these four tensors on CPU and GPU; it reads a float32 step and
    # leaves everything alone where found_inf is 1.
    torch._fused_adamw_(
        [param], [scaled], [exp_avg], [exp_avg_sq], [],
        [torch.as_tensor(step, device=param.device).to(torch.float32)],
        lr=lr, beta1=beta1, beta2=beta2, weight_decay=weight_decay, eps=eps, amsgrad=False, maximize=False,
        grad_scale=None, found_inf=None if skip is None else skip.to(torch.float32),
    )  # fmt: skip
    for ema, decay in zip(emas, ema_decays, strict=True):
        ema.lerp_(param, _ema_weight(decay, skip, param))
    if bf16_out is not None:
        bf16_out.copy_(param if skip is None else torch.where(skip, bf16_out, param.to(bf16_out.dtype)))


def adamw_ema_foreach(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    emas: Sequence[Sequence[Tensor]],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int | Tensor,
    ema_decays: Sequence[float | Tensor],
    skip: Tensor | None = None,
    grad_scale: float | Tensor = 1.0,
    bf16_outs: Sequence[Tensor | None] | None = None,
) -> None:
    """`adamw_ema` of every parameter of a list, in place; one pass over all of them on a CPU with csrc compiled.

    emas: for each decay the averages of all parameters. bf16_outs: `bf16_out` of each. Raises ValueError as `adamw_ema`
    does.
    """
    if len({len(some) for some in (params, grads, exp_avgs, exp_avg_sqs, *emas)}) != 1 or len(emas) != len(ema_decays):
        counts = [len(some) for some in (params, grads, exp_avgs, exp_avg_sqs, *emas)]
        raise ValueError(
            f"adamw_ema_foreach: lists of {counts} tensors for {len(ema_decays)} decays; lengths must agree"
        )
    copies = bf16_outs or [None] * len(params)
    if params and body(params[0]) == "native" and not any(copy is not None for copy in copies):
        for param, *rest in zip(params, grads, exp_avgs, exp_avg_sqs, *emas, strict=True):
            if any(x.shape != param.shape or x.dtype != torch.float32 or not x.is_contiguous() for x in (param, *rest)):
                described = [f"{x.dtype} {list(x.shape)} strides {x.stride()}" for x in (param, *rest)]
                raise ValueError(f"adamw_ema_foreach: tensors must be contiguous float32 of one shape, got {described}")
        torch.ops.pixelgen_native.adamw_ema_foreach(
            params, grads, exp_avgs, exp_avg_sqs, [ema for average in emas for ema in average],
            [_scalar(d, params[0]) for d in ema_decays], *_scalars(params[0], step, skip, grad_scale),
            lr, beta1, beta2, eps, weight_decay,
        )  # fmt: skip
        return
    rows = zip(params, grads, exp_avgs, exp_avg_sqs, copies, *emas, strict=True)
    for param, grad, exp_avg, exp_avg_sq, copy, *averages in rows:
        adamw_ema(
            param, grad, exp_avg, exp_avg_sq, averages, lr=lr, beta1=beta1, beta2=beta2, eps=eps,
            weight_decay=weight_decay, step=step, ema_decays=ema_decays, skip=skip, grad_scale=grad_scale,
            bf16_out=copy,
        )  # fmt: skip


def total_norm(tensors: Sequence[Tensor]) -> Tensor:
    """sqrt of the sum of all squares, a 0-dim tensor on the tensors' device; NaN or infinite if an element is."""
    if (
        tensors
        and body(tensors[0]) == "native"
        and all(x.dtype == torch.float32 and x.is_contiguous() for x in tensors)
    ):
        return torch.ops.pixelgen_native.total_norm(tensors)
    return torch.nn.utils.get_total_norm(tensors)


def _ema_weight(decay: float | Tensor, skip: Tensor | None, param: Tensor) -> float | Tensor:
    """1 - decay, or 0 in a skipped step: lerp by exactly 0 returns its first operand bit for bit."""
    if skip is None and not isinstance(decay, Tensor):
        return 1.0 - decay
    weight = torch.as_tensor(1.0 - decay, dtype=param.dtype, device=param.device)
    return weight if skip is None else weight * ~skip


def _scalar(value: float | Tensor, param: Tensor) -> Tensor:
    """A 0-dim float32 tensor on the shard's device; a number gets there by a fill, which does not wait."""
    if isinstance(value, Tensor):
        return value.to(param.device, torch.float32)
    return torch.full((), value, dtype=torch.float32, device=param.device)


def _scalars(
    param: Tensor, step: int | Tensor, skip: Tensor | None, grad_scale: float | Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    skip = param.new_zeros((), dtype=torch.bool) if skip is None else skip
    return _scalar(step, param), skip, _scalar(grad_scale, param)


def _check_kernel(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, emas: Sequence[Tensor], bf16_out: Tensor | None
) -> None:
    """What the kernel asks for beyond `_check`."""
    if param.dtype != torch.float32:
        raise ValueError(f"adamw_ema: param must be float32 for the kernel, got {param.dtype}; cast the shard")
    if len(emas) > MOST_EMAS:
        raise ValueError(f"adamw_ema: the kernel keeps at most {MOST_EMAS} EMAs in one pass, got {len(emas)}")
    named = [("param", param), ("grad", grad), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)]
    named += [("ema", e) for e in emas] + ([] if bf16_out is None else [("bf16_out", bf16_out)])
    for name, x in named:
        if not x.is_contiguous():
            raise ValueError(f"adamw_ema: {name} must be contiguous, got strides {x.stride()} for {list(x.shape)}")
        if x.device != param.device:
            raise ValueError(f"adamw_ema: {name} must be on {param.device}, got {x.device}")


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
