"""Non-causal softmax attention:  out = softmax(q k^T / sqrt(d)) v  per head.

One signature over the libraries that may be installed, tried in this order: flash-attn 4, 3, 2, xformers, and
PyTorch's scaled_dot_product_attention (SDPA), which is always there. A CPU uses csrc for float32 heads of up to
NATIVE_TOKENS tokens, which fit its cache, and SDPA for the rest. A library is used after
its forward and backward have given the right numbers on this device, in this dtype and head size; one that is
installed and fails is reported as a warning. PIXELGEN_ATTENTION=flash|xformers|sdpa forces a choice.

The libraries run inside one registered operator, so that torch.compile and the FLOP counter see them alike. It keeps
q, k, v, out and the log-sum-exp for backward. Backward is bitwise repeatable where the library's is:
torch.use_deterministic_algorithms(True) asks for it. This is the only file that imports flash_attn or xformers.
Shapes: q, k, v, out [B, L, H, d]; lse [B, H, L] float32.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.flop_counter import (
    flop_registry,
    register_flop_formula,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from pixelgen_kernels.agreement import relative_error, worst
from pixelgen_kernels.bodies import choose_body
from pixelgen_kernels.registration import operator

Family = Literal["flash", "xformers", "sdpa"]
Forward = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
Backward = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]

VARIABLE = "PIXELGEN_ATTENTION"
SDPA = "PyTorch SDPA"
# Longest sequence, and divisor of the head size, of the CPU body.
NATIVE_TOKENS, NATIVE_LANES = 128, 8
# The libraries' kernels exist for this device type and these dtypes.
KERNEL_DEVICE = "cuda"
KERNEL_DTYPES = (torch.bfloat16, torch.float16)
# Relative error of outputs and gradients that a probe accepts: a few roundings to bfloat16, 2^-8 at most each.
PROBE_TOLERANCE = 2e-2


def attention_reference(q_BLHd: Tensor, k_BLHd: Tensor, v_BLHd: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q_BLHd, k_BLHd, v_BLHd))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def _flash_4() -> tuple[Forward, Backward]:
    from flash_attn.cute import flash_attn_func
    from flash_attn.cute.interface import _flash_attn_bwd

    def backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> Any:
        return _flash_attn_bwd(q, k, v, out, dout, lse, **_deterministic())

    return lambda q, k, v: flash_attn_func(q, k, v, return_lse=True), backward


def _flash_3() -> tuple[Forward, Backward]:
    from flash_attn_interface import _flash_attn_backward, flash_attn_func

    def backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> Any:
        grads = tuple(x.new_empty(x.shape) for x in (q, k, v))
        # six arguments of variable-length batches, then the outputs, the scale and "not causal"
        _flash_attn_backward(
            dout, q, k, v, out, lse, *[None] * 6, *grads, q.shape[-1] ** -0.5, False, **_deterministic()
        )
        return grads

    return lambda q, k, v: flash_attn_func(q, k, v, return_attn_probs=True), backward


def _flash_2() -> tuple[Forward, Backward]:
    from flash_attn.flash_attn_interface import _flash_attn_backward, flash_attn_func

    def backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> Any:
        grads = tuple(x.new_empty(x.shape) for x in (q, k, v))
        deterministic = torch.are_deterministic_algorithms_enabled()
        # dropout, scale, causal, window left and right, soft cap, ALiBi slopes
        _flash_attn_backward(
            dout, q, k, v, out, lse, *grads, 0.0, q.shape[-1] ** -0.5, False, -1, -1, 0.0, None, deterministic
        )
        return grads

    return lambda q, k, v: flash_attn_func(q, k, v, return_attn_probs=True), backward


def _xformers() -> tuple[Forward, Backward]:
    from xformers.ops import fmha

    def backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> Any:
        return fmha.memory_efficient_attention_backward(dout, out, lse, q, k, v)

    return fmha.memory_efficient_attention_forward_requires_grad, backward


def _deterministic() -> dict[str, bool]:
    return {"deterministic": True} if torch.are_deterministic_algorithms_enabled() else {}


class Library(NamedTuple):
    """How to import one library's forward and backward. modules: those whose absence means "not installed"."""

    family: Family
    load: Callable[[], tuple[Forward, Backward]]
    modules: tuple[str, ...]


LIBRARIES = {
    "flash-attn 4": Library("flash", _flash_4, ("flash_attn", "flash_attn.cute")),
    "flash-attn 3": Library("flash", _flash_3, ("flash_attn_interface",)),
    "flash-attn 2": Library("flash", _flash_2, ("flash_attn", "flash_attn.flash_attn_interface")),
    "xformers": Library("xformers", _xformers, ("xformers",)),
}


@functools.cache
def _load(name: str) -> tuple[Forward, Backward]:
    return LIBRARIES[name].load()


def attention_backend(device: torch.device | str, dtype: torch.dtype, head_dim: int) -> str:
    """One line for the log: what `attention` runs for such tensors, and why nothing before it is used.

    Raises ValueError when PIXELGEN_ATTENTION names no backend, or one that does not work here.
    """
    device = torch.device(device).type
    chosen, reasons = _choose(device, dtype, head_dim)
    if _native_heads(device, dtype, head_dim):
        chosen = f"csrc up to {NATIVE_TOKENS} tokens, {chosen} above,"
    because = f" ({'; '.join(reasons)})" if reasons else ""
    return f"attention: {chosen} on {device}, {str(dtype).removeprefix('torch.')}, head size {head_dim}{because}"


def _choose(device: str, dtype: torch.dtype, head_dim: int) -> tuple[str, tuple[str, ...]]:
    """(backend, why each one before it is not used), once for each device type, dtype, head size and choice."""
    return _resolve(device, dtype, head_dim, os.environ.get(VARIABLE, ""))


@functools.cache
def _resolve(device: str, dtype: torch.dtype, head_dim: int, forced: str) -> tuple[str, tuple[str, ...]]:
    if forced and forced not in get_args(Family):
        names = ", ".join(get_args(Family))
        raise ValueError(f"{VARIABLE}={forced!r} names no backend; use one of {names}, or unset it")
    if forced == "sdpa":
        return SDPA, (f"{VARIABLE}=sdpa",)
    candidates = [name for name, lib in LIBRARIES.items() if forced in ("", lib.family)]
    if device == "meta":
        # no kernel runs on meta tensors: any library stands for the shapes that all of them keep
        return candidates[0], ()
    if device != KERNEL_DEVICE or dtype not in KERNEL_DTYPES:
        reasons = [f"flash-attn and xformers run on {KERNEL_DEVICE} in bfloat16 and float16 only"]
        candidates = []
    else:
        reasons = []
    for name in candidates:
        reason = _probe(name, device, dtype, head_dim)
        if reason is None:
            return name, tuple(reasons)
        reasons.append(f"{name} {reason}")
    if forced:
        raise ValueError(
            f"{VARIABLE}={forced} cannot run on {device} in {dtype} with head size {head_dim}: {'; '.join(reasons)}; "
            f"install what is missing, or unset {VARIABLE}"
        )
    return SDPA, tuple(reasons)


def _probe(name: str, device: str, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why a library cannot be used, None where its output and gradients are right. Warns when it is installed."""
    try:
        # whoever traces or counts at the first call must not see the probe's own work
        with _disable_current_modes(), torch.no_grad():
            error = _probe_error(name, device, dtype, head_dim)
        reason = None if error <= PROBE_TOLERANCE else f"is wrong by {error:.1e} relative to PyTorch"
    except ModuleNotFoundError as missing:
        if missing.name in LIBRARIES[name].modules:
            return "is not installed"
        reason = f"cannot be imported: {missing}"
    except Exception as error:  # a library may fail in any way of its own; it is reported and not used
        reason = f"fails: {type(error).__name__}: {error}"
    if reason is not None:
        warnings.warn(f"attention: {name} is installed but not used: it {reason}", RuntimeWarning, stacklevel=2)
    return reason


def _probe_error(name: str, device: str, dtype: torch.dtype, head_dim: int) -> float:
    """Largest relative error of the output and the three gradients, on tensors laid out as a model's are."""
    generator = torch.Generator(device).manual_seed(0)
    shape = (2, 128, 2, head_dim)
    packed = torch.randn(2, 128, 3, 2, head_dim, generator=generator, device=device).to(dtype)
    q, k = (packed[:, :, i].contiguous() for i in range(2))
    v, dout = packed[:, :, 2], torch.randn(shape, generator=generator, device=device).to(dtype)
    out, lse = _run_forward(name, q, k, v)
    results = (out, *_run_backward(name, dout, q, k, v, out, lse))
    with torch.enable_grad():
        leaves = [x.float().requires_grad_() for x in (q, k, v)]
        scores = torch.einsum("blhd,bmhd->bhlm", leaves[0], leaves[1]) * head_dim**-0.5
        expected = torch.einsum("bhlm,bmhd->blhd", scores.softmax(-1), leaves[2])
        grads = torch.autograd.grad(expected, leaves, dout.float())
    return worst(relative_error(out, exact) for out, exact in zip(results, (expected, *grads), strict=True))


def _run_forward(name: str, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    # flash-attn 2 returns a third tensor; xformers pads lse
    out, lse = _load(name)[0](q, k, v)[:2]
    return out.contiguous(), lse[..., : q.shape[1]].contiguous()


def _run_backward(
    name: str, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = _load(name)[1](dout, q, k, v, out, lse)[:3]
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, name: str) -> tuple[Tensor, Tensor]:
    B, L, H, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((B, H, L), dtype=torch.float32)


def _fake_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, name: str
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _flops(q: torch.Size, k: torch.Size, v: torch.Size, name: str, **_: Any) -> int:
    return sdpa_flop_count(*(_heads_first(shape) for shape in (q, k, v)))


def _flops_backward(dout: torch.Size, q: torch.Size, k: torch.Size, v: torch.Size, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(*(_heads_first(shape) for shape in (dout, q, k, v)))


def _heads_first(shape: torch.Size) -> tuple[int, ...]:
    B, L, H, d = shape
    return B, H, L, d


@operator("attention", _fake_forward, _flops)
def attention_forward(q: Tensor, k: Tensor, v: Tensor, name: str) -> tuple[Tensor, Tensor]:
    return _fake_forward(q, k, v, name) if q.is_meta or not q.numel() else _run_forward(name, q, k, v)


@operator("attention_backward", _fake_backward, _flops_backward)
def attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, name: str
) -> tuple[Tensor, Tensor, Tensor]:
    if q.is_meta or not q.numel():
        return _fake_backward(dout, q, k, v, out, lse, name)
    return _run_backward(name, dout, q, k, v, out, lse)


# The CPU body of few tokens; csrc implements it and its gradient.
torch.library.define("pixelgen_native::attention", "(Tensor q, Tensor k, Tensor v) -> (Tensor out, Tensor lse)")
torch.library.define(
    "pixelgen_native::attention_backward",
    "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse) -> (Tensor dq, Tensor dk, Tensor dv)",
)
torch.library.register_fake("pixelgen_native::attention", lambda q, k, v: _fake_forward(q, k, v, ""))
torch.library.register_fake("pixelgen_native::attention_backward", lambda *tensors: _fake_backward(*tensors, ""))
register_flop_formula(torch.ops.pixelgen_native.attention)(lambda q, k, v, **_: _flops(q, k, v, ""))
register_flop_formula(torch.ops.pixelgen_native.attention_backward)(lambda *shapes, **_: _flops_backward(*shapes))


def _native_heads(device: str, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether csrc has attention for such heads here, and nothing else is asked for."""
    wanted = device == "cpu" and dtype == torch.float32 and head_dim % NATIVE_LANES == 0
    return wanted and not os.environ.get(VARIABLE) and choose_body(device)[0] == "native"


def _count_cpu_sdpa() -> None:
    """PyTorch's FLOP counter knows SDPA's CUDA operators; its CPU operator does the same products."""
    aten = torch.ops.aten
    for op, count, tensors in (
        (aten._scaled_dot_product_flash_attention_for_cpu, sdpa_flop_count, 3),
        (aten._scaled_dot_product_flash_attention_for_cpu_backward, sdpa_backward_flop_count, 4),
    ):
        if op not in flop_registry:
            register_flop_formula(op)(lambda *shapes, count=count, tensors=tensors, **_: count(*shapes[:tensors]))


_count_cpu_sdpa()


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.name = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    if dout is None:
        return None, None, None, None
    return *attention_backward(dout.contiguous(), *ctx.saved_tensors, ctx.name), None


attention_forward.gradient(_save, _backward)


def attention(q_BLHd: Tensor, k_BLHd: Tensor, v_BLHd: Tensor) -> Tensor:
    """Return [B, L, H, d] in q's dtype. q, k and v have one shape, dtype and device, unit stride along d.

    Raises ValueError naming what does not fit, or when PIXELGEN_ATTENTION asks for what does not work here.
    """
    if q_BLHd.ndim != 4:
        raise ValueError(f"attention: q must be [B, L, H, d], got {list(q_BLHd.shape)}")
    for name, tensor in (("k", k_BLHd), ("v", v_BLHd)):
        if tensor.shape != q_BLHd.shape or tensor.dtype != q_BLHd.dtype or tensor.device != q_BLHd.device:
            raise ValueError(
                f"attention: {name} must be like q, {list(q_BLHd.shape)} {q_BLHd.dtype} on {q_BLHd.device}, "
                f"got {list(tensor.shape)} {tensor.dtype} on {tensor.device}"
            )
    chosen = _backend(q_BLHd.device.type, q_BLHd.dtype, q_BLHd.shape[-1])
    if chosen == SDPA:
        if runs_native(q_BLHd, q_BLHd.shape[1], q_BLHd.shape[-1]):
            return torch.ops.pixelgen_native.attention(q_BLHd, k_BLHd, v_BLHd)[0]
        return attention_reference(q_BLHd, k_BLHd, v_BLHd)
    return attention_forward.apply(q_BLHd, k_BLHd, v_BLHd, chosen)[0]


def runs_native(like: Tensor, tokens: int, head_dim: int) -> bool:
    """Whether csrc takes the attention of so many tokens on such a tensor's device, and nothing else is asked for."""
    return tokens <= NATIVE_TOKENS and _native(like.device.type, like.dtype, head_dim)


@torch.compiler.assume_constant_result
def _native(device: str, dtype: torch.dtype, head_dim: int) -> bool:
    return _native_heads(device, dtype, head_dim)


@torch.compiler.assume_constant_result
def _backend(device: str, dtype: torch.dtype, head_dim: int) -> str:
    return _choose(device, dtype, head_dim)[0]
