"""PixelDiT's published weights: Lightning checkpoints with denoiser. and ema_denoiser. in front of every name.

Packed here: w1 | w3 of a feed-forward layer. Split: the modulation of a pixel block, whose rows are (pixel, slot,
channel), into the slots of its attention and those of its MLP. Weights that NVIDIA published stay under NVIDIA's
licence (NSCLv1, research and evaluation only) after conversion.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from pixelgen_fast.interop.form import PublicForm
from pixelgen_fast.interop.layout import Shapes, State, add_linear, arguments, depth, require
from pixelgen_fast.layers import swiglu_width
from pixelgen_fast.models.pixeldit import Settings
from pixelgen_fast.weights import rename

PREFIXES = {"ema": "ema_denoiser.", "raw": "denoiser."}
IGNORED = ("diffusion_trainer.",)  # the projector of the alignment loss


def config(mapping: Mapping[str, Any]) -> tuple[Settings, int, int]:
    """Translate the public constructor's arguments. Returns (model config, image size, number of classes).

    Keys: image_size (256), in_channels (3), num_groups, hidden_size, pixel_hidden_size (16), patch_depth, pixel_depth,
    patch_size (16), num_classes (1000), use_pixel_abs_pos (true), pit_adaln_post_modulation (false).
    """
    found = arguments(
        mapping,
        fixed={"in_channels": 3, "use_pixel_abs_pos": True},
        required=("num_groups", "hidden_size", "patch_depth", "pixel_depth"),
        optional=("image_size", "num_classes", "pixel_hidden_size", "patch_size", "pit_adaln_post_modulation"),
    )
    image_size, num_classes = found.pop("image_size", 256), found.pop("num_classes", 1000)
    names = {"num_groups": "num_heads", "pit_adaln_post_modulation": "post_modulation"}
    return Settings(**{names.get(key, key): value for key, value in found.items()}), image_size, num_classes


def public_shapes(c: Settings, image_size: int, num_classes: int) -> Shapes:
    """Names and shapes of a published PixelDiT, in the order of its state dict; the same at every image size."""
    D, C, P, d = c.hidden_size, c.pixel_hidden_size, c.patch_size**2, c.hidden_size // c.num_heads
    F = swiglu_width(D)
    shapes: Shapes = {}

    def attention(name: str) -> None:
        add_linear(shapes, f"{name}.qkv", 3 * D, D, bias=False)
        shapes[f"{name}.q_norm.weight"] = shapes[f"{name}.k_norm.weight"] = (d,)
        add_linear(shapes, f"{name}.proj", D, D)

    add_linear(shapes, "pixel_embedder.proj", C, 3)
    add_linear(shapes, "s_embedder.proj", D, 3 * P)
    add_linear(shapes, "t_embedder.mlp.0", D, 256)
    add_linear(shapes, "t_embedder.mlp.2", D, D)
    shapes["y_embedder.embedding_table.weight"] = (num_classes + 1, D)
    shapes["final_layer.norm.weight"] = (C,)
    add_linear(shapes, "final_layer.linear", 3, C)
    for i in range(c.patch_depth):
        block = f"patch_blocks.{i}"
        shapes[f"{block}.norm1.weight"] = shapes[f"{block}.norm2.weight"] = (D,)
        attention(f"{block}.attn")
        add_linear(shapes, f"{block}.mlp.w1", F, D, bias=False)
        add_linear(shapes, f"{block}.mlp.w3", F, D, bias=False)
        add_linear(shapes, f"{block}.mlp.w2", D, F, bias=False)
        add_linear(shapes, f"{block}.adaLN_modulation.0", 6 * D, D)
    for i in range(c.pixel_depth):
        block = f"pixel_blocks.{i}"
        shapes[f"{block}.norm1.weight"] = shapes[f"{block}.norm2.weight"] = (C,)
        add_linear(shapes, f"{block}.compress_to_attn", D, P * C)
        add_linear(shapes, f"{block}.expand_from_attn", P * C, D)
        attention(f"{block}.attn")
        add_linear(shapes, f"{block}.mlp.fc1", c.pixel_mlp_ratio * C, C)
        add_linear(shapes, f"{block}.mlp.fc2", C, c.pixel_mlp_ratio * C)
        add_linear(shapes, f"{block}.adaLN_modulation.0", (4 if c.post_modulation else 6) * C * P, D)
    return shapes


_NAMES = [
    (r"pixel_embedder\.proj", "pixel_embed"),
    (r"s_embedder\.proj", "patch_embed"),
    (r"t_embedder", "t_embed"),
    (r"y_embedder\.embedding_table", "y_embed"),
    (r"final_layer\.norm", "head.norm"),
    (r"final_layer\.linear", "head.linear"),
    (r"compress_to_attn", "compress"),
    (r"expand_from_attn", "expand"),
    (r"(pixel_blocks\.\d+)\.mlp\.fc", r"\1.fc"),
    (r"(patch_blocks\.\d+)\.adaLN_modulation\.0", r"\1.modulation"),
]


def to_native(state: State, config: Settings) -> dict[str, Tensor]:
    """Rename and pack the weights of a published PixelDiT; differentiable."""
    state, native = dict(state), {}
    for name in [name for name in state if name.endswith("mlp.w1.weight")]:
        gate, value = state.pop(name), state.pop(name.replace("w1", "w3"))
        native[name.replace("w1", "w13")] = torch.cat([gate, value])
    for name in [name for name in state if re.match(r"pixel_blocks\.\d+\.adaLN_modulation", name)]:
        block, kind = name.split(".adaLN_modulation.0.")
        slots = rearrange(
            state.pop(name), "(P K C) ... -> P K C ...", P=config.patch_size**2, C=config.pixel_hidden_size
        )
        if not config.post_modulation:
            native[f"{block}.modulation_attn.{kind}"] = slots[:, :2].flatten(0, 2)
            slots = slots[:, 2:]
        native[f"{block}.modulation_mlp.{kind}"] = slots.flatten(0, 2)
    return native | {rename(name, _NAMES): value for name, value in state.items()}


def config_of(state: State) -> Settings:
    """The size of a published PixelDiT, from the shapes of its weights. Raises ValueError when keys are missing."""
    require(state, "PixelDiT", (
        "s_embedder.proj.weight", "pixel_embedder.proj.weight", "patch_blocks.0.attn.q_norm.weight",
        "pixel_blocks.0.adaLN_modulation.0.weight", "pixel_blocks.0.mlp.fc1.weight",
    ))  # fmt: skip
    D, features = state["s_embedder.proj.weight"].shape
    C = state["pixel_embedder.proj.weight"].shape[0]
    P = features // 3
    slots = state["pixel_blocks.0.adaLN_modulation.0.weight"].shape[0] // (P * C)
    return Settings(
        hidden_size=D,
        num_heads=D // state["patch_blocks.0.attn.q_norm.weight"].shape[0],
        patch_depth=depth(state, "patch_blocks."),
        patch_size=round(P**0.5),
        pixel_hidden_size=C,
        pixel_depth=depth(state, "pixel_blocks."),
        pixel_mlp_ratio=state["pixel_blocks.0.mlp.fc1.weight"].shape[0] // C,
        post_modulation=slots == 4,
    )


FORM = PublicForm(PREFIXES, config, public_shapes, to_native, config_of, ignored=IGNORED)
