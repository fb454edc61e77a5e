"""MAR's published weights: a dictionary with `model` and its average `model_ema`, names without prefix.

Reshaped here: tables and tokens, which have leading dimensions of 1 in the file, and the rows of the classes, behind
which comes that of no class, `fake_latent` in the file. The public code and its weights are under the MIT licence; the
weights are of the latents of a KL autoencoder, 16 numbers each, times 0.2325.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pixelgen_fast.errors import InputError
from pixelgen_fast.interop.form import PublicForm
from pixelgen_fast.interop.layout import (
    Shapes,
    State,
    add_linear,
    add_norm,
    add_vit_block,
    arguments,
    depth,
    require,
)
from pixelgen_fast.models.mar import PIXELS, Settings, decoder_of
from pixelgen_fast.weights import rename

PREFIXES = {"ema": "", "raw": ""}
_ENTRIES = {"ema": "model_ema", "raw": "model"}
# of the published sizes, by the width of the encoder: heads, and the guidance that they are drawn with
_HEADS = {768: 12, 1024: 16, 1280: 16}
_GUIDANCE = {768: 2.9, 1024: 3.0, 1280: 3.2}


def read(content: Any, prefixes: Mapping[str, str]) -> dict[str, State]:
    """Raises ValueError when the file has none of the public code's entries."""
    entries = content if isinstance(content, dict) else {}
    found = {kind: entries[name] for kind, name in _ENTRIES.items() if isinstance(entries.get(name), dict)}
    if not found:
        raise InputError(f"a MAR checkpoint has one of {', '.join(_ENTRIES.values())}, this file has none")
    return found


def config(mapping: Mapping[str, Any]) -> tuple[Settings, int, int]:
    """Translate the public constructor's arguments. Returns (model config, side in pixels or latents, classes).

    Keys: img_size (256), vae_stride (16), patch_size (1), channels or vae_embed_dim (16), encoder_embed_dim,
    encoder_depth, encoder_num_heads, decoder_embed_dim, decoder_depth, decoder_num_heads, class_num (1000),
    buffer_size (64), mask_ratio_min (0.7), dropout (0.1), diffloss_d, diffloss_w, batch_mul or diffusion_batch_mul (4);
    mlp_ratio (4). Without vae_stride, img_size is the side of what the network sees.
    """
    names = {
        "encoder_embed_dim": "hidden_size",
        "encoder_depth": "depth",
        "encoder_num_heads": "num_heads",
        "decoder_embed_dim": "decoder_hidden_size",
        "decoder_depth": "decoder_depth",
        "decoder_num_heads": "decoder_num_heads",
        "diffloss_d": "head_depth",
        "diffloss_w": "head_width",
    }
    optional = {
        "buffer_size": "class_tokens",
        "mask_ratio_min": "mask_low",
        "dropout": "dropout",
        "batch_mul": "draws_per_patch",
        "diffusion_batch_mul": "draws_per_patch",
        "channels": "channels",
        "vae_embed_dim": "channels",
        "patch_size": "patch_size",
    }
    found = arguments(
        mapping, fixed={"mlp_ratio": 4.0}, required=names, optional=(*optional, "img_size", "vae_stride", "class_num")
    )
    side, num_classes = found.pop("img_size", 16) // found.pop("vae_stride", 1), found.pop("class_num", 1000)
    known = {"patch_size": 1, "channels": 16}
    return Settings(**known | {(names | optional)[key]: value for key, value in found.items()}), side, num_classes


def public_shapes(c: Settings, side: int, num_classes: int) -> Shapes:
    """Names and shapes of a published MAR, in the order of its state dict."""
    (width, decoder_depth, _), D, W = decoder_of(c), c.hidden_size, c.head_width
    length, patch = (side // c.patch_size) ** 2, c.channels * c.patch_size**2
    tokens = length + c.class_tokens
    shapes: Shapes = {"fake_latent": (1, D), "encoder_pos_embed_learned": (1, tokens, D), "mask_token": (1, 1, width)}
    shapes |= {"decoder_pos_embed_learned": (1, tokens, width), "diffusion_pos_embed_learned": (1, length, width)}
    shapes["class_emb.weight"] = (num_classes, D)
    add_linear(shapes, "z_proj", D, patch)
    add_norm(shapes, "z_proj_ln", D)
    for i in range(c.depth):
        add_vit_block(shapes, f"encoder_blocks.{i}", D)
    add_norm(shapes, "encoder_norm", D)
    add_linear(shapes, "decoder_embed", width, D)
    for i in range(decoder_depth):
        add_vit_block(shapes, f"decoder_blocks.{i}", width)
    add_norm(shapes, "decoder_norm", width)
    shapes |= {f"{HEAD}{name}": shape for name, shape in head_shapes(patch, width, W, c.head_depth).items()}
    return shapes


HEAD = "diffloss.net."


def head_shapes(patch: int, condition: int, W: int, blocks: int) -> Shapes:
    """Names and shapes of the diffusion's network."""
    shapes: Shapes = {}
    add_linear(shapes, "time_embed.mlp.0", W, 256)
    add_linear(shapes, "time_embed.mlp.2", W, W)
    add_linear(shapes, "cond_embed", W, condition)
    add_linear(shapes, "input_proj", W, patch)
    for i in range(blocks):
        add_norm(shapes, f"res_blocks.{i}.in_ln", W)
        add_linear(shapes, f"res_blocks.{i}.mlp.0", W, W)
        add_linear(shapes, f"res_blocks.{i}.mlp.2", W, W)
        add_linear(shapes, f"res_blocks.{i}.adaLN_modulation.1", 3 * W, W)
    add_linear(shapes, "final_layer.linear", 2 * patch, W)
    add_linear(shapes, "final_layer.adaLN_modulation.1", 2 * W, W)
    return shapes


HEAD_NAMES = [
    (r"time_embed", "t_embed"),
    (r"cond_embed", "condition"),
    (r"input_proj", "enter"),
    (r"res_blocks", "layers"),
    (r"in_ln", "norm"),
    (r"final_layer\.linear", "leave"),
    (r"final_layer\.", ""),
    (r"adaLN_modulation\.1", "modulation"),
]
_TRUNK_NAMES = [
    (r"z_proj_ln", "enter_norm"),
    (r"z_proj", "enter"),
    (r"decoder_embed", "cross"),
    (r"encoder_pos_embed_learned", "encoder_position"),
    (r"decoder_pos_embed_learned", "decoder_position"),
    (r"diffusion_pos_embed_learned", "target_position"),
    (r"attn\.|mlp\.", ""),
]


def to_native(state: State, config: Settings) -> dict[str, Tensor]:
    """Rename and reshape the weights of a published MAR; differentiable."""
    native = {"trunk.y_embed.weight": torch.cat([state["class_emb.weight"], state["fake_latent"]])}
    for name, value in state.items():
        if name.startswith(HEAD):
            native["head." + rename(name.removeprefix(HEAD), HEAD_NAMES)] = value
        elif name not in ("class_emb.weight", "fake_latent"):
            one = name.endswith(("_learned", "mask_token"))
            native["trunk." + rename(name, _TRUNK_NAMES)] = value.flatten(0, -2).squeeze(0) if one else value
    return native


def to_public(native: State, config: Settings) -> dict[str, Tensor]:
    """The weights of a MAR under the published names, the inverse of `to_native`."""
    rows, length = native["trunk.y_embed.weight"], len(native["trunk.target_position"])
    shapes = public_shapes(config, round(length**0.5) * config.patch_size, len(rows) - 1)
    public = {"class_emb.weight": rows[:-1], "fake_latent": rows[-1:]}
    for name in shapes:
        if name.startswith(HEAD):
            public[name] = native["head." + rename(name.removeprefix(HEAD), HEAD_NAMES)]
        elif name not in public:
            public[name] = native["trunk." + rename(name, _TRUNK_NAMES)]
    return {name: public[name].reshape(shape) for name, shape in shapes.items()}


def config_of(state: State) -> Settings:
    """The size of a published MAR. Raises ValueError when keys are missing or no published size has that width."""
    told = ("z_proj.weight", "encoder_pos_embed_learned", "diffusion_pos_embed_learned", "decoder_embed.weight")
    require(state, "MAR", (*told, f"{HEAD}cond_embed.weight", "class_emb.weight", "fake_latent"))
    D, patch = state["z_proj.weight"].shape
    length, width = state["diffusion_pos_embed_learned"].shape[1:]
    if D not in _HEADS or width != D:
        raise InputError(f"a MAR of width {D} and {width}: not a published size, whose heads are known")
    side = round((patch / PIXELS) ** 0.5)
    pixels = PIXELS * side**2 == patch
    return Settings(
        hidden_size=D,
        num_heads=_HEADS[D],
        depth=depth(state, "encoder_blocks."),
        decoder_depth=depth(state, "decoder_blocks."),
        patch_size=side if pixels else 1,
        channels=PIXELS if pixels else patch,
        class_tokens=state["encoder_pos_embed_learned"].shape[1] - length,
        head_width=state[f"{HEAD}cond_embed.weight"].shape[0],
        head_depth=depth(state, f"{HEAD}res_blocks."),
    )


def image_size_of(state: State, config: Settings) -> int:
    return round(state["diffusion_pos_embed_learned"].shape[1] ** 0.5) * config.patch_size


def sections(config: Settings, side: int) -> dict[str, dict[str, Any]]:
    """256 passes, 100 steps, and the guidance published for the size."""
    return {"sample": {"steps": 100, "passes": 256, "guidance": _GUIDANCE[config.hidden_size]}}


FORM = PublicForm(
    PREFIXES,
    config,
    public_shapes,
    to_native,
    config_of,
    read=read,
    image_size_of=image_size_of,
    sections=sections,
    class_table="class_emb.weight",
    no_class=lambda state: 0,
    to_public=to_public,
)
