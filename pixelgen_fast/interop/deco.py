"""DeCo's published weights: Lightning checkpoints with denoiser. and ema_denoiser. in front of every name.

Packed here: w1 | w3 of a feed-forward layer. The published repository has no licence; its weights keep that state.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pixelgen_fast.interop.form import PublicForm
from pixelgen_fast.interop.layout import Shapes, State, add_linear, arguments, depth, require
from pixelgen_fast.layers import swiglu_width
from pixelgen_fast.models.deco import FREQUENCIES, Settings
from pixelgen_fast.weights import rename

PREFIXES = {"ema": "ema_denoiser.", "raw": "denoiser."}
IGNORED = ("diffusion_trainer.",)  # the projector of the alignment loss


def config(mapping: Mapping[str, Any]) -> tuple[Settings, int, int]:
    """Translate the public constructor's arguments. Returns (model config, image size, number of classes).

    Keys: image_size (256), in_channels (3), num_groups, hidden_size, hidden_size_x (32), num_blocks (patch and decoder
    blocks together), num_cond_blocks (patch blocks), patch_size (16), num_classes (1000), nerf_mlpratio (no weight
    depends on it).
    """
    found = arguments(
        mapping,
        fixed={"in_channels": 3},
        required=("num_groups", "hidden_size", "num_blocks", "num_cond_blocks"),
        optional=("image_size", "num_classes", "hidden_size_x", "patch_size", "nerf_mlpratio"),
    )
    settings = Settings(
        hidden_size=found["hidden_size"],
        num_heads=found["num_groups"],
        patch_depth=found["num_cond_blocks"],
        patch_size=found.get("patch_size", 16),
        decoder_width=found.get("hidden_size_x", 32),
        decoder_depth=found["num_blocks"] - found["num_cond_blocks"],
    )
    return settings, found.get("image_size", 256), found.get("num_classes", 1000)


def public_shapes(c: Settings, image_size: int, num_classes: int) -> Shapes:
    """Names and shapes of a published DeCo, in the order of its state dict; the same at every image size."""
    D, C, P, d = c.hidden_size, c.decoder_width, c.patch_size**2, c.hidden_size // c.num_heads
    F = swiglu_width(D)
    shapes: Shapes = {}
    add_linear(shapes, "x_embedder.embedder.0", C, 3 + FREQUENCIES**2)
    add_linear(shapes, "s_embedder.proj", D, 3 * P)
    add_linear(shapes, "t_embedder.mlp.0", D, 256)
    add_linear(shapes, "t_embedder.mlp.2", D, D)
    shapes["y_embedder.embedding_table.weight"] = (num_classes + 1, D)
    for i in range(c.patch_depth):
        block = f"blocks.{i}"
        shapes[f"{block}.norm1.weight"] = (D,)
        add_linear(shapes, f"{block}.attn.qkv", 3 * D, D, bias=False)
        shapes[f"{block}.attn.q_norm.weight"] = shapes[f"{block}.attn.k_norm.weight"] = (d,)
        add_linear(shapes, f"{block}.attn.proj", D, D)
        shapes[f"{block}.norm2.weight"] = (D,)
        add_linear(shapes, f"{block}.mlp.w1", F, D, bias=False)
        add_linear(shapes, f"{block}.mlp.w3", F, D, bias=False)
        add_linear(shapes, f"{block}.mlp.w2", D, F, bias=False)
        add_linear(shapes, f"{block}.adaLN_modulation.0", 6 * D, D)
    add_linear(shapes, "dec_net.cond_embed", P * C, D)
    add_linear(shapes, "dec_net.input_proj", C, C)
    for i in range(c.decoder_depth):
        block = f"dec_net.res_blocks.{i}"
        shapes[f"{block}.in_ln.weight"] = shapes[f"{block}.in_ln.bias"] = (C,)
        add_linear(shapes, f"{block}.mlp.0", C, C)
        add_linear(shapes, f"{block}.mlp.2", C, C)
        add_linear(shapes, f"{block}.adaLN_modulation.1", 3 * C, C)
    add_linear(shapes, "dec_net.final_layer.linear", 3, C)
    return shapes


_NAMES = [
    (r"^x_embedder\.embedder\.0", "pixel_embed"),
    (r"^s_embedder\.proj", "patch_embed"),
    (r"^t_embedder", "t_embed"),
    (r"^y_embedder\.embedding_table", "y_embed"),
    (r"^blocks\.", "patch_blocks."),
    (r"adaLN_modulation\.[01]", "modulation"),
    (r"^dec_net\.cond_embed", "condition"),
    (r"^dec_net\.input_proj", "pixel_proj"),
    (r"^dec_net\.res_blocks", "decoder_blocks"),
    (r"\.in_ln\.", ".norm."),
    (r"(decoder_blocks\.\d+)\.mlp\.0\.", r"\1.fc1."),
    (r"(decoder_blocks\.\d+)\.mlp\.2\.", r"\1.fc2."),
    (r"^dec_net\.final_layer\.linear", "head.1"),
]


def to_native(state: State, config: Settings) -> dict[str, Tensor]:
    """Rename and pack the weights of a published DeCo; differentiable."""
    state, native = dict(state), {}
    for name in [name for name in state if name.endswith("mlp.w1.weight")]:
        gate, value = state.pop(name), state.pop(name.replace("w1", "w3"))
        native[rename(name.replace("w1", "w13"), _NAMES)] = torch.cat([gate, value])
    return native | {rename(name, _NAMES): value for name, value in state.items()}


def config_of(state: State) -> Settings:
    """The size of a published DeCo, from the shapes of its weights. Raises ValueError when keys are missing."""
    require(state, "DeCo", (
        "s_embedder.proj.weight", "blocks.0.attn.q_norm.weight", "dec_net.input_proj.weight",
        "dec_net.res_blocks.0.in_ln.weight",
    ))  # fmt: skip
    D, features = state["s_embedder.proj.weight"].shape
    return Settings(
        hidden_size=D,
        num_heads=D // state["blocks.0.attn.q_norm.weight"].shape[0],
        patch_depth=depth(state, "blocks."),
        patch_size=round((features // 3) ** 0.5),
        decoder_width=state["dec_net.input_proj.weight"].shape[0],
        decoder_depth=depth(state, "dec_net.res_blocks."),
    )


FORM = PublicForm(PREFIXES, config, public_shapes, to_native, config_of, ignored=IGNORED)
