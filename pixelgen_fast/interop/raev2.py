"""RAEv2's published weights: the names of DiT-DH's, and those of its tokens and of its weaker prediction.

In public t = 0 is data; the prediction is of x in both. Packed here: q, k and v, and the first two layers of a
feed-forward layer. The public weights are under CC BY-NC 4.0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from pixelgen_fast.interop import ditdh
from pixelgen_fast.interop.form import PublicForm
from pixelgen_fast.interop.layout import Shapes, State, arguments, require
from pixelgen_fast.interop.packing import Packed, linear, pack, shapes_of, unpack
from pixelgen_fast.layers import swiglu_width
from pixelgen_fast.models.raev2 import Settings

CLASS_TABLE = "ctx_embedder.embedding_table.weight"


def config(mapping: Mapping[str, Any]) -> tuple[Settings, int, int]:
    """Translate the public constructor's arguments. Returns (model config, image size, number of classes).

    Keys: those of DiT-DH without its switches, base_model_depth (8), num_t_tokens (4), num_c_tokens (8).
    """
    found = arguments(
        mapping,
        fixed={},
        required=("in_channels", "hidden_size", "depth", "num_heads"),
        optional=("input_size", "num_classes", "base_model_depth", "num_t_tokens", "num_c_tokens"),
    )
    settings, image_size, num_classes = ditdh.sizes(found)
    names = {"base_model_depth": "base_depth", "num_t_tokens": "time_tokens", "num_c_tokens": "class_tokens"}
    settings |= {ours: found[theirs] for theirs, ours in names.items() if theirs in found}
    return Settings(**settings), image_size, num_classes


def packing(c: Settings, num_classes: int = 0) -> list[Packed]:
    """Every weight of a published RAEv2 generator."""
    D, W, C = c.hidden_size, c.head_width, c.latent_channels
    entries = [
        *linear("enter", ["s_embedder.proj"], D, C, ditdh.PIXEL),
        *linear("head.enter", ["x_embedder.proj"], W, C, ditdh.PIXEL),
        *(linear("head.condition", ["s_projector"], W, D) if D != W else []),
        Packed("t_embed.frequencies", {"t_embedder.W": (256,)}),
        Packed("time_tokens", {"t_embedder.learnable_tokens": (c.time_tokens, D)}),
        *linear("t_embed.mlp.0", ["t_embedder.mlp.0"], D, 512),
        *linear("t_embed.mlp.2", ["t_embedder.mlp.2"], D, D),
        Packed("class_tokens", {"ctx_embedder.learnable_tokens": (c.class_tokens, D)}),
        Packed("y_embed.weight", {CLASS_TABLE: (num_classes + 1, D)}),
    ]
    for i in range(c.depth):
        entries += _block(f"encoder_blocks.{i}", f"blocks.{i}", D, D // c.num_heads, modulated=False)
    for i in range(c.head_depth):
        entries += _block(f"head.blocks.{i}", f"blocks.{c.depth + i}", W, W // c.head_heads, modulated=True)
    return [*entries, *_last("head.out", "final_layer", W, C), *_last("base", "base_final_layer", D, C)]


def _block(ours: str, theirs: str, D: int, head_dim: int, modulated: bool) -> list[Packed]:
    F = swiglu_width(D)
    norms = {"norm1": D, "norm2": D, "attn.q_norm": head_dim, "attn.k_norm": head_dim}
    return [
        *(Packed(f"{ours}.{norm}.weight", {f"{theirs}.{norm}.weight": (width,)}) for norm, width in norms.items()),
        *linear(f"{ours}.attn.qkv", [f"{theirs}.attn.{part}" for part in "qkv"], D, D),
        *linear(f"{ours}.attn.proj", [f"{theirs}.attn.proj"], D, D),
        *linear(f"{ours}.mlp.w13", [f"{theirs}.mlp.w1", f"{theirs}.mlp.w2"], F, D),
        *linear(f"{ours}.mlp.w2", [f"{theirs}.mlp.w3"], D, F),
        *(linear(f"{ours}.modulation", [f"{theirs}.adaln_modulation.1"], 6 * D, D) if modulated else []),
    ]


def _last(ours: str, theirs: str, D: int, C: int) -> list[Packed]:
    return [
        Packed(f"{ours}.norm.weight", {f"{theirs}.norm.weight": (D,)}),
        *linear(f"{ours}.linear", [f"{theirs}.linear"], C, D),
        *linear(f"{ours}.modulation", [f"{theirs}.adaln_modulation.1"], 2 * D, D),
    ]


def public_shapes(c: Settings, image_size: int, num_classes: int) -> Shapes:
    """Names and shapes of a published RAEv2 generator."""
    tables = {name: tuple(table.shape) for name, table in fixed(c, image_size).items()}
    return tables | shapes_of(packing(c, num_classes))


def fixed(c: Settings, image_size: int) -> dict[str, Tensor]:
    n = image_size // c.patch_size
    return {
        **ditdh.rotary("enc_rope", n, c.hidden_size // c.num_heads, c.time_tokens + c.class_tokens),
        **ditdh.rotary("dec_rope", n, c.head_width // c.head_heads),
    }


def config_of(state: State) -> Settings:
    """The size of a published RAEv2 generator. Raises ValueError when keys are missing.

    The block of the weaker prediction leaves no trace in shapes; it is the published one, the eighth.
    """
    tokens = ("t_embedder.learnable_tokens", "ctx_embedder.learnable_tokens")
    settings = ditdh.sizes_of(state, "RAEv2", ("enc_rope.freqs_cos", "dec_rope.freqs_cos"))
    require(state, "RAEv2", tokens)
    time_tokens, class_tokens = (len(state[name]) for name in tokens)
    base = min(Settings.base_depth, settings["depth"])
    return Settings(**settings, time_tokens=time_tokens, class_tokens=class_tokens, base_depth=base)


def image_size_of(state: State, config: Settings) -> int:
    return round(state["dec_rope.freqs_cos"].shape[0] ** 0.5) * config.patch_size


def sections(c: Settings, image_size: int) -> dict[str, dict[str, Any]]:
    """Prediction of x; 100 Euler steps, guided by the weaker prediction from the first one on."""
    shift = ditdh.shift_of(c, image_size)
    return {
        "objective": {"predict": "x", "time_shift": shift},
        "sample": {"steps": 100, "solver": "euler", "shift": shift, "guidance": 1.78, "interval": [-1.0, 0.9]},
    }


def call(net: Callable[..., Any], x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """(prediction, weaker prediction)."""
    return net(x, 1 - t, y, both=True)


FORM = PublicForm(
    ditdh.PREFIXES,
    config,
    public_shapes,
    lambda state, settings: pack(packing(settings), state),
    config_of,
    read=ditdh.read,
    image_size_of=image_size_of,
    fixed=fixed,
    frozen=("t_embedder.W",),
    class_table=CLASS_TABLE,
    bare="ema",
    call=call,
    to_public=lambda weights, settings: unpack(packing(settings, len(weights["y_embed.weight"]) - 1), weights),
    sections=sections,
)
