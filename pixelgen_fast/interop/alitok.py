"""AliTok's published weights: alitok_{b,l,xl}.bin, a bare state dict, and the tokenizer that turns tokens into images.

Split here: the embeddings, whose rows are the words, one that nothing reads, the classes, and no class. Packed: w1 | w3
of a feed-forward layer. The tokenizer's file, AliTok.pth, is read as it is. The authors' repository has no licence:
their weights come with no grant of use, before conversion and after.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pixelgen_fast.errors import InputError
from pixelgen_fast.interop.form import PublicForm
from pixelgen_fast.interop.layout import Shapes, State, add_linear, arguments, depth, require
from pixelgen_fast.layers import swiglu_width
from pixelgen_fast.models.alitok import Settings
from pixelgen_fast.models.alitok_tokenizer import read_weights
from pixelgen_fast.weights import rename

CLASS_TABLE = "embeddings.weight"
IMAGE_SIZE = 256
# of the published sizes, by (width, blocks): guidance and its power, and whether those are for SoftCFG
GUIDANCE = {(768, 24): (16.0, 1.8, False), (1024, 24): (6.0, 0.7, False), (1280, 32): (9.0, 1.5, True)}
_TOKENIZER = ("latent_tokens", "encoder.patch_embed.weight", "encoder.positional_embedding", "decoder.class_embedding",
              "quantize.embedding.weight")  # fmt: skip
# heads of the tokenizer leave no trace in its shapes; all published ones are of this size
_HEAD = 64


def read(content: Any, prefixes: Mapping[str, str]) -> dict[str, State]:
    """Raises ValueError: only a file of weights alone is as published."""
    raise InputError("an AliTok file is a state dict alone, this one holds other things")


def config(mapping: Mapping[str, Any]) -> tuple[Settings, int, int]:
    """Translate the public constructor's arguments. Returns (model config, image size, number of classes).

    Keys: hidden_size, depth, num_heads, codebook_size (4096), num_classes (1000), seq_len (273, at most), and
    none_condition_id, which must be codebook_size + 1 + num_classes.
    """
    found = arguments(
        mapping,
        fixed={},
        required=("hidden_size", "depth", "num_heads"),
        optional=("codebook_size", "num_classes", "seq_len", "none_condition_id"),
    )
    sizes = {name: found[name] for name in ("hidden_size", "depth", "num_heads")}
    settings = Settings(**sizes, codebook_size=found.get("codebook_size", 4096))
    length, num_classes = (
        settings.prefix_tokens + (IMAGE_SIZE // settings.patch_size) ** 2,
        found.get("num_classes", 1000),
    )
    if found.get("seq_len", length) > length:
        raise InputError(f"config: seq_len {found['seq_len']} is above {length}, the positions that there are")
    null = settings.codebook_size + 1 + num_classes
    if found.get("none_condition_id", null) != null:
        raise InputError(f"config: none_condition_id {found['none_condition_id']} is not {null}, the last embedding")
    return settings, IMAGE_SIZE, num_classes


def public_shapes(c: Settings, image_size: int, num_classes: int) -> Shapes:
    """Names and shapes of a published AliTok, in the order of its state dict; the same at every image size."""
    D, F, V = c.hidden_size, swiglu_width(c.hidden_size, 256), c.codebook_size
    shapes: Shapes = {}
    for i in range(c.depth):
        block = f"blocks.{i}"
        shapes[f"{block}.norm1.weight"] = (D,)
        add_linear(shapes, f"{block}.attn.qkv", 3 * D, D)
        shapes[f"{block}.attn.q_norm.weight"] = shapes[f"{block}.attn.k_norm.weight"] = (D // c.num_heads,)
        add_linear(shapes, f"{block}.attn.proj", D, D)
        shapes[f"{block}.norm2.weight"] = (D,)
        add_linear(shapes, f"{block}.mlp.w1", F, D, bias=False)
        add_linear(shapes, f"{block}.mlp.w3", F, D, bias=False)
        add_linear(shapes, f"{block}.mlp.w2", D, F, bias=False)
    shapes[CLASS_TABLE] = (V + 2 + num_classes, D)
    shapes["norm.weight"] = (D,)
    add_linear(shapes, "output", V, D)
    return shapes


_NAMES = [(r"^norm", "head.norm"), (r"^output", "head.linear"), (r"^", "transformer.")]


def to_native(state: State, config: Settings) -> dict[str, Tensor]:
    """Rename, split and pack the weights of a published AliTok; differentiable."""
    state, native = dict(state), {}
    table, rows = state.pop(CLASS_TABLE), config.codebook_size + 1
    native["transformer.token_embed.weight"], native["transformer.y_embed.weight"] = table[:rows], table[rows:]
    for name in [name for name in state if name.endswith("mlp.w1.weight")]:
        gate, value = state.pop(name), state.pop(name.replace("w1", "w3"))
        native[rename(name.replace("w1", "w13"), _NAMES)] = torch.cat([gate, value])
    return native | {rename(name, _NAMES): value for name, value in state.items()}


def to_public(native: State, config: Settings) -> dict[str, Tensor]:
    """The state dict that the public code loads, of the weights of an AliTok: the way back from `to_native`."""
    native, public = {name.removeprefix("transformer."): value for name, value in native.items()}, {}
    public[CLASS_TABLE] = torch.cat([native.pop("token_embed.weight"), native.pop("y_embed.weight")])
    for name, value in native.items():
        if name.endswith("mlp.w13.weight"):
            public[name.replace("w13", "w1")], public[name.replace("w13", "w3")] = value.chunk(2)
        else:
            public[re.sub(r"^head\.linear", "output", name.replace("head.norm", "norm"))] = value
    return {name: public[name] for name in public_shapes(config, IMAGE_SIZE, 0)}


def config_of(state: State) -> Settings:
    """The size of a published AliTok and its published guidance. Raises ValueError when keys are missing."""
    require(state, "AliTok", (CLASS_TABLE, "output.bias", "blocks.0.attn.q_norm.weight"))
    D, count = state[CLASS_TABLE].shape[1], depth(state, "blocks.")
    known = Settings()
    _, power, soft = GUIDANCE.get((D, count), (1.0, known.guidance_power, known.softcfg))
    return Settings(
        hidden_size=D,
        num_heads=D // state["blocks.0.attn.q_norm.weight"].shape[0],
        depth=count,
        codebook_size=len(state["output.bias"]),
        guidance_power=power,
        softcfg=soft,
    )


def with_tokenizer(settings: Settings, file: Path) -> tuple[Settings, int]:
    """(settings with the tokenizer of a file, size of its images). Raises InputError for one of other words."""
    state = read_weights(str(file))
    require(state, "AliTok tokenizer", _TOKENIZER)
    tokens, patches = state["latent_tokens"], state["encoder.positional_embedding"]
    words, K = state["quantize.embedding.weight"], state["decoder.class_embedding"]
    if len(words) != settings.codebook_size:
        raise InputError(f"{file}: has {len(words):,} words, and the model draws {settings.codebook_size:,}")
    patch, grid = state["encoder.patch_embed.weight"].shape[-1], round(len(patches) ** 0.5)
    return replace(
        settings,
        tokenizer=str(file),
        patch_size=patch,
        token_size=words.shape[1],
        prefix_tokens=len(tokens) - grid**2,
        encoder_width=tokens.shape[1],
        encoder_depth=depth(state, "encoder.transformer."),
        encoder_heads=max(1, tokens.shape[1] // _HEAD),
        decoder_width=K.shape[1],
        decoder_depth=depth(state, "decoder.transformer."),
        decoder_heads=max(1, K.shape[1] // _HEAD),
        decoder_tokens=len(K),
    ), patch * grid


def sections(config: Settings, image_size: int) -> dict[str, dict[str, Any]]:
    """The guidance published for the size; none for other sizes."""
    return {"sample": {"guidance": GUIDANCE.get((config.hidden_size, config.depth), (1.0,))[0]}}


FORM = PublicForm(
    {"raw": ""},
    config,
    public_shapes,
    to_native,
    config_of,
    read=read,
    sections=sections,
    to_public=to_public,
    class_table=CLASS_TABLE,
    no_class=lambda state: len(state["output.bias"]) + 2,
    parts={"tokenizer": with_tokenizer},
)
