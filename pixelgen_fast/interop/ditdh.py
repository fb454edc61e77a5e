"""DiT-DH's published weights: the state dict of RAE's second stage, alone or as `ema` of a training checkpoint.

In public t = 0 is data and v = noise - x, so net(x, t) = -ours(x, 1 - t): the last layer changes its sign here, and the
time is 1 - t in the model itself. Reshaped: the convolutions of 1 x 1 pixels. The position table and the rotary tables
in the file are what the model computes; `t_embedder.W`, drawn once, is not. The public code and its weights are under
the MIT licence.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pixelgen_fast.errors import InputError
from pixelgen_fast.interop.form import PublicForm
from pixelgen_fast.interop.layout import Shapes, State, arguments, require
from pixelgen_fast.interop.layout import depth as count_of
from pixelgen_fast.interop.packing import Packed, linear, pack, shapes_of, unpack
from pixelgen_fast.layers import rope_2d_axial, sincos_2d, swiglu_width
from pixelgen_fast.models.ditdh import Settings

PREFIXES = {"ema": "", "raw": ""}
_ENTRIES = {"ema": "ema", "raw": "model"}
_HEAD_DEPTH = 2  # of all published sizes
PIXEL = (1, 1)


def read(content: Any, prefixes: Mapping[str, str]) -> dict[str, State]:
    """Raises ValueError when a training checkpoint has neither the average nor the model."""
    found = {kind: content[name] for kind, name in _ENTRIES.items() if isinstance(content.get(name), dict)}
    if not found:
        raise InputError("a training checkpoint has 'ema' or 'model', this file has neither")
    return found


def pair(config: Mapping[str, Any], key: str) -> tuple[int, int]:
    """A setting of the encoder and of the head. Raises ValueError, naming it, for another number of values."""
    value = config[key]
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise InputError(f"config: {key} is {value}; give one for the encoder and one for the head")
    return value[0], value[1]


def sizes(found: Mapping[str, Any]) -> tuple[dict[str, Any], int, int]:
    """(settings, image size, number of classes) of the arguments that DiT-DH and RAEv2 share."""
    (width, head_width), (depth, head_depth), (heads, head_heads) = (
        pair(found, key) for key in ("hidden_size", "depth", "num_heads")
    )
    settings = dict(hidden_size=width, num_heads=heads, depth=depth, latent_channels=found["in_channels"])
    settings |= dict(head_width=head_width, head_heads=head_heads, head_depth=head_depth)
    return settings, Settings.patch_size * found.get("input_size", 16), found.get("num_classes", 1000)


def config(mapping: Mapping[str, Any]) -> tuple[Settings, int, int]:
    """Translate the public constructor's arguments. Returns (model config, image size, number of classes).

    Keys: input_size (16), in_channels, hidden_size, depth and num_heads, a pair each, num_classes (1000); patch_size
    (1), mlp_ratio (4), class_dropout_prob (0.1) and the switches of the published models. A latent is 16 pixels wide.
    """
    found = arguments(
        mapping,
        fixed={
            "patch_size": 1, "mlp_ratio": 4.0, "class_dropout_prob": 0.1, "use_qknorm": False, "use_swiglu": True,
            "use_rope": True, "use_rmsnorm": True, "wo_shift": False, "use_pos_embed": True,
        },
        required=("in_channels", "hidden_size", "depth", "num_heads"),
        optional=("input_size", "num_classes"),
    )  # fmt: skip
    settings, image_size, num_classes = sizes(found)
    return Settings(**settings), image_size, num_classes


def packing(c: Settings, num_classes: int = 0) -> list[Packed]:
    """Every weight of a published DiT-DH, in the order of its state dict."""
    D, W, C = c.hidden_size, c.head_width, c.latent_channels
    entries = [
        *linear("head.enter", ["x_embedder.proj"], W, C, PIXEL),
        *linear("enter", ["s_embedder.proj"], D, C, PIXEL),
        *(linear("head.condition", ["s_projector"], W, D) if D != W else []),
        Packed("t_embed.frequencies", {"t_embedder.W": (256,)}),
        *linear("t_embed.mlp.0", ["t_embedder.mlp.0"], D, 512),
        *linear("t_embed.mlp.2", ["t_embedder.mlp.2"], D, D),
        Packed("y_embed.weight", {"y_embedder.embedding_table.weight": (num_classes + 1, D)}),
        Packed("head.out.norm.weight", {"final_layer.norm_final.weight": (W,)}),
        *linear("head.out.linear", ["final_layer.linear"], C, W, sign=-1),
        *linear("head.out.modulation", ["final_layer.adaLN_modulation.1"], 2 * W, W),
    ]
    for i in range(c.depth + c.head_depth):
        ours, width = (f"encoder_blocks.{i}", D) if i < c.depth else (f"head.blocks.{i - c.depth}", W)
        entries += _block(ours, f"blocks.{i}", width)
    return entries


def _block(ours: str, theirs: str, D: int) -> list[Packed]:
    F = swiglu_width(D)
    return [
        *(Packed(f"{ours}.{norm}.weight", {f"{theirs}.{norm}.weight": (D,)}) for norm in ("norm1", "norm2")),
        *linear(f"{ours}.attn.qkv", [f"{theirs}.attn.qkv"], 3 * D, D),
        *linear(f"{ours}.attn.proj", [f"{theirs}.attn.proj"], D, D),
        *linear(f"{ours}.mlp.w13", [f"{theirs}.mlp.w12"], 2 * F, D),
        *linear(f"{ours}.mlp.w2", [f"{theirs}.mlp.w3"], D, F),
        *linear(f"{ours}.modulation", [f"{theirs}.adaLN_modulation.1"], 6 * D, D),
    ]


def public_shapes(c: Settings, image_size: int, num_classes: int) -> Shapes:
    """Names and shapes of a published DiT-DH."""
    tables = {name: tuple(table.shape) for name, table in fixed(c, image_size).items()}
    return tables | shapes_of(packing(c, num_classes))


def rotary(name: str, n: int, head_dim: int, unturned: int = 0) -> dict[str, Tensor]:
    """Two rotary tables as published: a frequency for each number of a pair; the last `unturned` tokens are not."""
    cos, sin = (table.repeat_interleave(2, dim=1) for table in rope_2d_axial(n, n, head_dim))
    rest = torch.zeros(unturned, head_dim)
    return {f"{name}.freqs_cos": torch.cat([cos, rest + 1]), f"{name}.freqs_sin": torch.cat([sin, rest])}


def fixed(c: Settings, image_size: int) -> dict[str, Tensor]:
    n = image_size // c.patch_size
    return {
        "pos_embed": sincos_2d(n, n, c.hidden_size).flatten(0, 1)[None],
        **rotary("enc_feat_rope", n, c.hidden_size // c.num_heads),
        **rotary("dec_feat_rope", n, c.head_width // c.head_heads),
    }


def sizes_of(state: State, system: str, tables: tuple[str, str]) -> dict[str, Any]:
    """The settings that weights of DiT-DH and RAEv2 tell alike; heads by the widths of their rotary tables.

    Where encoder and head are equally wide, the last blocks are the head's, as many as in all published sizes.
    """
    require(state, system, ("s_embedder.proj.weight", "x_embedder.proj.weight", "blocks.0.norm1.weight", *tables))
    (D, C), W = state["s_embedder.proj.weight"].shape[:2], state["x_embedder.proj.weight"].shape[0]
    count = count_of(state, "blocks.")
    widths = [len(state.get(f"blocks.{i}.norm1.weight", ())) for i in range(count)]
    depth = widths.count(D) if D != W else max(count - _HEAD_DEPTH, 1)
    heads, head_heads = (width // state[name].shape[1] for width, name in zip((D, W), tables, strict=True))
    settings = dict(hidden_size=D, num_heads=heads, depth=depth, latent_channels=C)
    return settings | dict(head_width=W, head_heads=head_heads, head_depth=max(count - depth, 1))


def config_of(state: State) -> Settings:
    """The size of a published DiT-DH. Raises ValueError when keys are missing."""
    return Settings(**sizes_of(state, "DiT-DH", ("enc_feat_rope.freqs_cos", "dec_feat_rope.freqs_cos")))


def image_size_of(state: State, config: Settings) -> int:
    return round(state["dec_feat_rope.freqs_cos"].shape[0] ** 0.5) * config.patch_size


def shift_of(c: Settings, image_size: int) -> float:
    """The time shift that grows with the numbers of a sample: sqrt(C n n / 4096)."""
    return (c.latent_channels / 4096) ** 0.5 * (image_size // c.patch_size)


def sections(c: Settings, image_size: int) -> dict[str, dict[str, Any]]:
    """Times never nearer to data than 0.999, and 49 Euler steps up to there; guidance needs a second model."""
    shift = shift_of(c, image_size)
    return {
        "objective": {"time_shift": shift, "time_min": 0.001},
        "sample": {"steps": 49, "solver": "euler", "end": 0.999, "shift": shift},
    }


FORM = PublicForm(
    PREFIXES,
    config,
    public_shapes,
    lambda state, settings: pack(packing(settings), state),
    config_of,
    read=read,
    image_size_of=image_size_of,
    fixed=fixed,
    frozen=("t_embedder.W",),
    bare="ema",
    call=lambda net, x, t, y: -net(x, 1 - t, y),
    to_public=lambda weights, settings: unpack(packing(settings, len(weights["y_embed.weight"]) - 1), weights),
    sections=sections,
)
