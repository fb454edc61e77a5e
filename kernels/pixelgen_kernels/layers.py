"""The two layers of a transformer block, each of several operators and products.

    attention_layer   q, k, v = qk_norm_rope(x W_qkv^T);   out = attention(q, k, v) W_o^T + b_o
    swiglu_layer      (a | b) = x W_13^T;                  out = (silu(a) * b) W_2^T

On a CPU a layer is one node of autograd (csrc/layers.cpp): at a hundred thousand numbers an operator, half a small
model's time outside of products is what happens between them. The operators, what is kept and the results are the same.
Shapes: x [B, L, D]; W_qkv [3 H d, D]; W_o [D', H d]; cos, sin [L, d / 2]; W_13 [2 F, D]; W_2 [D', F].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pixelgen_kernels.attention import attention, runs_native
from pixelgen_kernels.bodies import body
from pixelgen_kernels.checks import check
from pixelgen_kernels.qk_norm_rope import qk_norm_rope
from pixelgen_kernels.swiglu_linear import swiglu_linear

torch.library.define(
    "pixelgen_native::attention_layer",
    "(Tensor x, Tensor qkv_weight, Tensor q_norm_weight, Tensor k_norm_weight, Tensor proj_weight, Tensor? proj_bias, "
    "Tensor cos, Tensor sin, int heads, float eps) -> Tensor",
)
torch.library.define("pixelgen_native::swiglu_layer", "(Tensor x, Tensor w13, Tensor w2) -> Tensor")


def attention_layer(
    x: Tensor,
    qkv_weight: Tensor,
    q_norm_weight: Tensor,
    k_norm_weight: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    eps: float = 1e-6,
) -> Tensor:
    """Self-attention of every image with itself: [B, L, D'] in x's dtype.

    Contiguous tensors of one dtype; cos and sin are constants. Raises ValueError as `qk_norm_rope` does.
    """
    L, d = x.shape[1], q_norm_weight.shape[0]
    if runs_native(x, L, d) and not torch.compiler.is_compiling():
        shapes = {
            "qkv_weight": (qkv_weight, (3 * heads * d, x.shape[-1])),
            "q_norm_weight": (q_norm_weight, (d,)),
            "k_norm_weight": (k_norm_weight, (d,)),
            "proj_weight": (proj_weight, (proj_weight.shape[0], heads * d)),
            "cos": (cos, (L, d // 2)),
            "sin": (sin, (L, d // 2)),
        }
        if proj_bias is not None:
            shapes["proj_bias"] = (proj_bias, (proj_weight.shape[0],))
        check("attention_layer", x, **shapes)
        return torch.ops.pixelgen_native.attention_layer(
            x, qkv_weight, q_norm_weight, k_norm_weight, proj_weight, proj_bias, cos, sin, heads, eps
        )
    q, k, v = qk_norm_rope(F.linear(x, qkv_weight), q_norm_weight, k_norm_weight, cos, sin, heads, eps)
    return F.linear(attention(q, k, v).flatten(2), proj_weight, proj_bias)


def swiglu_layer(x: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    """A SwiGLU feed-forward layer: [..., D'] in x's dtype. Raises ValueError when the weights do not fit."""
    if body(x) == "native" and not torch.compiler.is_compiling():
        hidden = w2.shape[1]
        check("swiglu_layer", x, w13=(w13, (2 * hidden, x.shape[-1])), w2=(w2, (w2.shape[0], hidden)))
        return torch.ops.pixelgen_native.swiglu_layer(x, w13, w2)
    return swiglu_linear(F.linear(x, w13), w2)
