"""JiT's published weights: a dictionary of the model and its two averages, with net. in front of every name.

Reshaped here: the two convolutions of the patch embedding, whose kernels are as large as their strides, to matrices.
`pos_embed` in the file is the fixed sine-cosine table. The public code and its weights are under the MIT licence.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pixelgen_fast.errors import InputError
from pixelgen_fast.interop.form import PublicForm
from pixelgen_fast.interop.layout import Shapes, State, add_linear, arguments, depth, require
from pixelgen_fast.layers import sincos_2d, swiglu_width
from pixelgen_fast.models.jit import Settings
from pixelgen_fast.weights import rename

PREFIXES = {"ema": "net.", "ema2": "net.", "raw": "net."}
_ENTRIES = {"ema": "model_ema1", "ema2": "model_ema2", "raw": "model"}


def read(content: Any, prefixes: Mapping[str, str]) -> dict[str, State]:
    """Raises ValueError when the file has none of the public code's entries."""
    entries = content if isinstance(content, dict) else {}
    found = {kind: entries[name] for kind, name in _ENTRIES.items() if isinstance(entries.get(name), dict)}
    if not found:
        raise InputError(f"a JiT checkpoint has one of {', '.join(_ENTRIES.values())}, this file has none")
    return found


def config(mapping: Mapping[str, Any]) -> tuple[Settings, int, int]:
    """Translate the public constructor's arguments. Returns (model config, image size, number of classes).

    Keys: input_size or image_size (256), in_channels (3), num_classes (1000), patch_size (16), hidden_size, depth,
    num_heads, bottleneck_dim, in_context_len (32), in_context_start, proj_drop (0); mlp_ratio (4), attn_drop (0).
    """
    found = arguments(
        mapping,
        fixed={"in_channels": 3, "mlp_ratio": 4.0, "attn_drop": 0.0},
        required=("hidden_size", "depth", "num_heads", "bottleneck_dim", "in_context_start"),
        optional=("input_size", "image_size", "num_classes", "patch_size", "in_context_len", "proj_drop"),
    )
    image_size = found.pop("image_size", found.get("input_size", 256))
    if found.pop("input_size", image_size) != image_size:
        raise InputError(f"config: input_size {mapping['input_size']} is not image_size {image_size}")
    num_classes = found.pop("num_classes", 1000)
    names = {
        "bottleneck_dim": "bottleneck",
        "in_context_len": "context_length",
        "in_context_start": "context_start",
        "proj_drop": "dropout",
    }
    return Settings(**{names.get(key, key): value for key, value in found.items()}), image_size, num_classes


def public_shapes(c: Settings, image_size: int, num_classes: int) -> Shapes:
    """Names and shapes of a published JiT, in the order of its state dict."""
    D, p, F = c.hidden_size, c.patch_size, swiglu_width(c.hidden_size)
    shapes: Shapes = {"pos_embed": (1, (image_size // p) ** 2, D)}
    if c.context_length:
        shapes["in_context_posemb"] = (1, c.context_length, D)
    add_linear(shapes, "t_embedder.mlp.0", D, 256)
    add_linear(shapes, "t_embedder.mlp.2", D, D)
    shapes["y_embedder.embedding_table.weight"] = (num_classes + 1, D)
    shapes["x_embedder.proj1.weight"] = (c.bottleneck, 3, p, p)
    shapes["x_embedder.proj2.weight"] = (D, c.bottleneck, 1, 1)
    shapes["x_embedder.proj2.bias"] = (D,)
    for i in range(c.depth):
        block = f"blocks.{i}"
        shapes[f"{block}.norm1.weight"] = (D,)
        shapes[f"{block}.attn.q_norm.weight"] = shapes[f"{block}.attn.k_norm.weight"] = (D // c.num_heads,)
        add_linear(shapes, f"{block}.attn.qkv", 3 * D, D)
        add_linear(shapes, f"{block}.attn.proj", D, D)
        shapes[f"{block}.norm2.weight"] = (D,)
        add_linear(shapes, f"{block}.mlp.w12", 2 * F, D)
        add_linear(shapes, f"{block}.mlp.w3", D, F)
        add_linear(shapes, f"{block}.adaLN_modulation.1", 6 * D, D)
    shapes["final_layer.norm_final.weight"] = (D,)
    add_linear(shapes, "final_layer.linear", 3 * p**2, D)
    add_linear(shapes, "final_layer.adaLN_modulation.1", 2 * D, D)
    return shapes


def fixed(c: Settings, image_size: int) -> dict[str, Tensor]:
    n = image_size // c.patch_size
    return {"pos_embed": sincos_2d(n, n, c.hidden_size).flatten(0, 1)[None]}


_NAMES = [
    (r"in_context_posemb", "context_position"),
    (r"t_embedder", "t_embed"),
    (r"y_embedder\.embedding_table", "y_embed"),
    (r"x_embedder\.proj1", "patch_embed.down"),
    (r"x_embedder\.proj2", "patch_embed.up"),
    (r"final_layer\.norm_final", "head.norm"),
    (r"final_layer", "head"),
    (r"adaLN_modulation\.1", "modulation"),
    (r"mlp\.w3", "mlp.w2"),
    (r"mlp\.w12", "mlp.w13"),
    (r"^blocks", "transformer"),
]


def to_native(state: State, config: Settings) -> dict[str, Tensor]:
    """Rename and reshape the weights of a published JiT; differentiable."""
    native = {}
    for name, value in state.items():
        if name.startswith("x_embedder.") and value.ndim == 4:
            value = value.flatten(1)
        native[rename(name, _NAMES)] = value[0] if name == "in_context_posemb" else value
    return native


def config_of(state: State) -> Settings:
    """The size of a published JiT. Raises ValueError when keys are missing.

    The block that context tokens enter at leaves no trace in shapes; it is the published one of that depth.
    """
    require(state, "JiT", ("pos_embed", "x_embedder.proj1.weight", "blocks.0.attn.q_norm.weight"))
    D, count = state["pos_embed"].shape[-1], depth(state, "blocks.")
    context = state.get("in_context_posemb")
    starts = {12: 4, 24: 8, 32: 10, 40: 10}
    if context is not None and count not in starts:
        depths = ", ".join(map(str, starts))
        raise InputError(f"a JiT of {count} blocks: where its context tokens enter is known for {depths} blocks only")
    return Settings(
        hidden_size=D,
        num_heads=D // state["blocks.0.attn.q_norm.weight"].shape[0],
        depth=count,
        patch_size=state["x_embedder.proj1.weight"].shape[-1],
        bottleneck=state["x_embedder.proj1.weight"].shape[0],
        context_length=0 if context is None else context.shape[1],
        context_start=starts.get(count, 0),
        # published with the sizes that were trained with it
        dropout=0.2 if count >= 32 else 0.0,
    )


def image_size_of(state: State, config: Settings) -> int:
    return round(state["pos_embed"].shape[1] ** 0.5) * config.patch_size


def sections(config: Settings, image_size: int) -> dict[str, dict[str, Any]]:
    """Prediction of x from noise that grows with the image; 50 Heun steps with the guidance published for the size."""
    small, large = {12: (3.0, 2.9), 24: (2.4, 2.5)}.get(config.depth, (2.2, 2.3))
    return {
        "objective": {"predict": "x", "noise_scale": image_size / 256},
        "sample": {
            "steps": 50,
            "solver": "heun",
            "guidance": small if image_size <= 256 else large,
            "interval": [0.1, 1.0],
        },
    }


FORM = PublicForm(
    PREFIXES,
    config,
    public_shapes,
    to_native,
    config_of,
    read=read,
    image_size_of=image_size_of,
    fixed=fixed,
    sections=sections,
)
