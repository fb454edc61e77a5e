"""What is one kernel on a GPU and is written out on the meta device: attention, and RMSNorm where asked.

    with gpu_kernels(fused_norms=True):
        module(meta_tensors)

Attention without a mask becomes PyTorch's flash kernel, with one its memory-efficient kernel; the FLOP formulas of both
are PyTorch's and count a causal half as whole. The functions are replaced where modules look them up, because no
function mode acts inside of a backward pass, in which blocks that recompute must find the same kernels again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@contextmanager
def gpu_kernels(fused_norms: bool) -> Iterator[None]:
    """Attention and, where asked, RMSNorm are inside the one kernel that they are on a GPU."""
    attention, norm = F.scaled_dot_product_attention, F.rms_norm
    F.scaled_dot_product_attention = _attention
    if fused_norms:
        F.rms_norm = _fused_norm
    try:
        yield
    finally:
        F.scaled_dot_product_attention, F.rms_norm = attention, norm


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **options: Any,
) -> Tensor:
    if attn_mask is None:
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal)[0]
    bias = attn_mask.to(query.dtype).expand(*query.shape[:-1], key.shape[-2])
    return torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, bias, True, dropout_p)[0]


def _fused_norm(x: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    return torch.ops.planning.rms_norm(x, x.new_ones(normalized_shape) if weight is None else weight)[0]


@torch.library.custom_op("planning::rms_norm", mutates_args=())
def _rms_norm(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(x.shape[:-1])


@torch.library.custom_op("planning::rms_norm_backward", mutates_args=())
def _rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, output[1])


_rms_norm.register_fake(_rms_norm._init_fn)
_rms_norm_backward.register_fake(_rms_norm_backward._init_fn)
_rms_norm.register_autograd(
    lambda ctx, dy, dr: torch.ops.planning.rms_norm_backward(dy, *ctx.saved_tensors), setup_context=_save
)
