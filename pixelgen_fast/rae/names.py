"""Published names of RAE's parts: the decoder's, the discriminator's heads, and encoders that are no DINO.

    published decoder                                       here
    decoder_layers.0.attention.attention.{query,key,value}  blocks.0.qkv
    decoder_layers.0.attention.output.dense                 blocks.0.proj
    decoder_layers.0.{intermediate,output}.dense            blocks.0.{fc1,fc2}
    decoder_layers.0.layernorm_{before,after}               blocks.0.norm{1,2}
    decoder_{embed,norm,pred}, trainable_cls_token          embed, norm, head, cls_token
    decoder_pos_embed                                       computed: MAE's table

Renaming and packing are differentiable. MAE and SigLIP come in the names of Hugging Face (transformers 4 and 5) or of
timm; a DINO's names are dino/names.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pixelgen_fast.dino import names as dino_names
from pixelgen_fast.errors import InputError
from pixelgen_fast.rae.decoder import DecoderSettings, position_table
from pixelgen_fast.weights import rename

State = Mapping[str, Tensor]
TABLE = "decoder_pos_embed"
# heads of the decoders that are published, by their widths: weights do not tell them
_HEADS = {768: 12, 1024: 16, 1152: 16}
_PARTS = ("query", "key", "value")

_DECODER = [
    ("decoder_layers.", "blocks."),
    (".attention.output.dense.", ".proj."),
    (".intermediate.dense.", ".fc1."),
    (".output.dense.", ".fc2."),
    (".layernorm_before.", ".norm1."),
    (".layernorm_after.", ".norm2."),
    ("decoder_embed.", "embed."),
    ("decoder_norm.", "norm."),
    ("decoder_pred.", "head."),
    ("trainable_cls_token", "cls_token"),
]
_HEAD = [
    (r"^(heads\.\d+)\.0\.0\.", r"\1.enter.conv."),
    (r"^(heads\.\d+)\.0\.1\.", r"\1.enter.norm."),
    (r"^(heads\.\d+)\.1\.fn\.0\.", r"\1.mix.conv."),
    (r"^(heads\.\d+)\.1\.fn\.1\.", r"\1.mix.norm."),
    (r"^(heads\.\d+)\.2\.", r"\1.leave."),
    (r"\.weight_orig$", ".weight"),
    (r"\.weight_([uv])$", r".\1"),
]
_MAE = [
    (r"^vit\.", ""),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.", ""),
    (r"^(encoder\.layer|layers)\.", "blocks."),
    (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.attention\.(attention\.)?([qkv])\w+\.", r".attn.\2."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"^layernorm\.", "norm."),
]
_SIGLIP = [
    (r"^vision_model\.", ""),
    (r"^embeddings\.patch_embedding\.", "patch_embed.proj."),
    (r"^embeddings\.position_embedding\.weight$", "pos_embed"),
    (r"^encoder\.layers\.", "blocks."),
    (r"\.layer_norm(\d)\.", r".norm\1."),
    (r"\.self_attn\.out_proj\.", ".attn.proj."),
    (r"\.self_attn\.(\w)\w*_proj\.", r".attn.\1."),
    (r"^post_layernorm\.", "norm."),
]
# what pre-training needs and an encoder does not
_UNUSED = re.compile(
    r"^(decoder|text_model|logit_|head\.|vision_model\.head\.|attn_pool\.|vit\.embeddings\.mask_token)"
)


def decoder_to_native(state: State) -> dict[str, Tensor]:
    """The weights of a published decoder under our names; its position table is left out."""
    native = {name: value for name, value in state.items() if name != TABLE}
    native = _packed(native, ".attention.attention.", ".qkv", _PARTS)
    return {_replaced(name, _DECODER): value for name, value in native.items()}


def decoder_to_public(state: State, grid: int) -> dict[str, Tensor]:
    """The weights of our decoder under the published names, with the table. grid: n."""
    public = {TABLE: position_table(grid, state["cls_token"].shape[-1])}
    for name, value in state.items():
        name = _replaced(name, [(new, old) for old, new in _DECODER])
        if ".qkv." in name:
            split = zip(_PARTS, value.chunk(3), strict=True)
            public |= {name.replace(".qkv.", f".attention.attention.{part}."): v.clone() for part, v in split}
        else:
            public[name] = value
    return public


def published_decoder(state: State, origin: str) -> tuple[DecoderSettings, int, int]:
    """(settings, latent channels, grid) of a published decoder, from the shapes of its weights.

    Raises InputError, naming `origin`, for weights that are no decoder's, a width whose heads are not known, and a
    position table that is not MAE's.
    """
    wanted = (TABLE, "decoder_embed.weight", "decoder_pred.weight", "decoder_layers.0.intermediate.dense.weight")
    if missing := [name for name in wanted if name not in state]:
        raise InputError(f"{origin}: not a decoder of RAE: it lacks {', '.join(missing)}")
    table, embed, pred, ffn = (state[name] for name in wanted)
    width, latent_dim = embed.shape
    grid, patch = round((table.shape[1] - 1) ** 0.5), round((len(pred) / 3) ** 0.5)
    if width not in _HEADS:
        raise InputError(
            f"{origin}: a decoder of width {width}, and how many heads it has is known of {', '.join(map(str, _HEADS))}"
            " alone; keep it as a folder that pixelgen decoder writes"
        )
    fixed = position_table(grid, width)
    # half a bf16 digit, for files whose tables were rounded with their weights
    if table.shape != fixed.shape or not torch.allclose(table.float(), fixed, 0, 4e-3):
        raise InputError(f"{origin}: {TABLE} is not the table that the decoder computes")
    depth = len({name.split(".")[1] for name in state if name.startswith("decoder_layers.")})
    return DecoderSettings(width, depth, _HEADS[width], len(ffn), patch), latent_dim, grid


def heads_to_native(state: State) -> dict[str, Tensor]:
    """The discriminator's heads under our names: weights, and the vectors u and v of their spectral norms."""
    return {rename(name, _HEAD): value for name, value in state.items()}


def encoder_to_timm(state: State, network: nn.Module, origin: str) -> dict[str, Tensor]:
    """Weights of an encoder under timm's names: a DINO, MAE or SigLIP, as Hugging Face, Meta or timm name them.

    Raises what dino.names.to_timm raises.
    """
    if any(".layernorm_before." in name for name in state):
        patterns = _MAE
    elif any(".self_attn." in name for name in state):
        patterns = _SIGLIP
    else:
        return dino_names.to_timm({n: v for n, v in state.items() if not _UNUSED.match(n)}, network, origin)
    renamed = {rename(name, patterns): value for name, value in state.items() if not _UNUSED.match(name)}
    if renamed["pos_embed"].ndim == 2:
        renamed["pos_embed"] = renamed["pos_embed"][None]
    return _packed(renamed, ".attn.", ".attn.qkv", ("q", "k", "v"))


def _packed(state: State, inside: str, packed: str, parts: tuple[str, ...]) -> dict[str, Tensor]:
    """Queries, keys and values of each attention, named <inside><part>., in one product named <packed>."""
    native = dict(state)
    first = f"{inside}{parts[0]}."
    for name in [name for name in state if first in name]:
        values = [native.pop(name.replace(first, f"{inside}{part}.")) for part in parts]
        native[name.replace(first, f"{packed}.")] = torch.cat(values)
    return native


def _replaced(name: str, names: list[tuple[str, str]]) -> str:
    for old, new in names:
        name = name.replace(old, new)
    return name
