"""Operators of pixel-space image generators. The package imports torch, triton and einops only."""

from pixelgen_kernels.adamw_ema import adamw_ema
from pixelgen_kernels.attention import attention
from pixelgen_kernels.flow_loss import flow_loss
from pixelgen_kernels.layers import attention_layer, swiglu_layer
from pixelgen_kernels.norm_modulate import norm_modulate
from pixelgen_kernels.patch_projection import noised_patch_projection, patch_projection
from pixelgen_kernels.pixel_attention import PixelAttentionWeights, pixel_attention
from pixelgen_kernels.pixel_mlp import pixel_mlp
from pixelgen_kernels.pixel_modulate import pixel_modulate
from pixelgen_kernels.qk_norm_rope import qk_norm_rope, rotate
from pixelgen_kernels.swiglu import swiglu
from pixelgen_kernels.swiglu_linear import swiglu_linear

__all__ = [
    "PixelAttentionWeights",
    "adamw_ema",
    "attention",
    "attention_layer",
    "flow_loss",
    "noised_patch_projection",
    "norm_modulate",
    "patch_projection",
    "pixel_attention",
    "pixel_mlp",
    "pixel_modulate",
    "qk_norm_rope",
    "rotate",
    "swiglu",
    "swiglu_layer",
    "swiglu_linear",
]
