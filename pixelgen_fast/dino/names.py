"""The names of a DINO's weights: of timm, of Meta and of Hugging Face.

    Meta                        Hugging Face (transformers 4; where 5 differs)                  timm
    pos_embed                   embeddings.position_embeddings                                  pos_embed
    blocks.0.attn.qkv           encoder.layer.0.attention.attention.{query,key,value}           blocks.0.attn.qkv
                                (layer.0.attention.{q,k,v}_proj: also DINOv3)
    blocks.0.ls1.gamma          encoder.layer.0.layer_scale1.lambda1                            ls1.gamma | gamma_1
    register_tokens (v2),       embeddings.register_tokens                                      reg_token
    storage_tokens (v3)
    w1 gate, w2, w3 of SwiGLU   weights_in = gate | up, weights_out; {gate,up,down}_proj        fc1_g, fc1_x, fc2

Hugging Face's names become Meta's, and Meta's become timm's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pixelgen_fast.errors import InputError

# What Meta's files hold and inference does not need.
_UNUSED = ("mask_token", "rope_embed.periods", "local_cls_norm.weight", "local_cls_norm.bias")
_DINOV3 = {
    "storage_tokens": "reg_token",
    ".ls1.gamma": ".gamma_1",
    ".ls2.gamma": ".gamma_2",
    ".mlp.w1.": ".mlp.fc1_g.",
    ".mlp.w2.": ".mlp.fc1_x.",
    ".mlp.w3.": ".mlp.fc2.",
}
_DINOV2 = {".mlp.w12.": ".mlp.fc1.", ".mlp.w3.": ".mlp.fc2."}
_HUGGING_FACE = [
    (r"^(dinov2|dinov2_with_registers|dinov3_vit|dinov3|backbone)\.", ""),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.(projection\.)?", "patch_embed.proj."),
    (r"^embeddings\.", ""),
    (r"^(model\.|encoder\.)?layer\.", "blocks."),
    (r"^layernorm\.", "norm."),
    (r"\.attention\.(attention\.query|q_proj)\.", ".attn.q."),
    (r"\.attention\.(attention\.key|k_proj)\.", ".attn.k."),
    (r"\.attention\.(attention\.value|v_proj)\.", ".attn.v."),
    (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
    (r"\.mlp\.weights_in\.", ".mlp.w12."),
    (r"\.mlp\.weights_out\.", ".mlp.w3."),
]


def to_meta(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights under Hugging Face's names of DINOv2 and DINOv3 under Meta's; others as they are."""
    if not any(name.endswith("embeddings.cls_token") for name in state):
        return dict(state)
    renamed: dict[str, Tensor] = {}
    for name, value in state.items():
        for pattern, replacement in _HUGGING_FACE:
            name = re.sub(pattern, replacement, name)
        renamed[name] = value
    dinov3 = "pos_embed" not in renamed
    if dinov3 and "register_tokens" in renamed:
        renamed["storage_tokens"] = renamed.pop("register_tokens")
    _pack_feed_forward(renamed, dinov3)
    for name in [name for name in renamed if ".attn.q." in name]:
        q = renamed.pop(name)
        # DINOv3 has no bias of the keys
        k = renamed.pop(name.replace(".q.", ".k."), torch.zeros_like(q))
        renamed[name.replace(".q.", ".qkv.")] = torch.cat([q, k, renamed.pop(name.replace(".q.", ".v."), k * 0)])
    return renamed


def _pack_feed_forward(renamed: dict[str, Tensor], dinov3: bool) -> None:
    """gate_proj, up_proj and down_proj under Meta's names, in place: w1, w2, w3 or w12, w3; fc1, fc2 without a gate."""
    for name in [name for name in renamed if ".mlp.up_proj." in name]:
        up, down = renamed.pop(name), renamed.pop(name.replace("up_proj", "down_proj"))
        gate = renamed.pop(name.replace("up_proj", "gate_proj"), None)
        if gate is None:
            own = {"fc1": up, "fc2": down}
        else:
            own = {"w1": gate, "w2": up, "w3": down} if dinov3 else {"w12": torch.cat([gate, up]), "w3": down}
        renamed |= {name.replace("up_proj", key): value for key, value in own.items()}


def to_timm(state: Mapping[str, Tensor], network: nn.Module, origin: str) -> dict[str, Tensor]:
    """Weights under Meta's names renamed to those of timm's `network`; other weights as they are.

    DINOv3: `storage_tokens`, LayerScale and SwiGLU have other names, and qkv.bias is split where the network has biases
    (the timm models named _qkvb): that of the keys is masked out. DINOv2 with registers: timm adds no position to the
    class token, so the position that Meta adds is part of it.
    Hugging Face's names are taken too.
    Raises ValueError, naming `origin`, for biases that the network has no place for.
    """
    state = to_meta(state)
    if not state.keys() & {"storage_tokens", "register_tokens", "mask_token"}:
        return state
    dinov3 = "storage_tokens" in state
    renamed: dict[str, Tensor] = {}
    for name, value in state.items():
        if name in _UNUSED or name.endswith(".bias_mask"):
            continue
        if dinov3 and name.endswith(".attn.qkv.bias"):
            renamed |= _split_bias(name.removesuffix("qkv.bias"), state, network, origin)
            continue
        for old, new in (_DINOV3 if dinov3 else _DINOV2).items():
            name = name.replace(old, new)
        renamed[name] = value
    if "register_tokens" in renamed:
        position = renamed["pos_embed"]
        renamed["reg_token"] = renamed.pop("register_tokens")
        renamed["cls_token"] = renamed["cls_token"] + position[:, :1]
        renamed["pos_embed"] = position[:, 1:]
    return renamed


def _split_bias(attention: str, state: Mapping[str, Tensor], network: nn.Module, origin: str) -> dict[str, Tensor]:
    """q_bias and v_bias of one attention, if the network has them."""
    q, k, v = state[f"{attention}qkv.bias"].chunk(3)
    mask = state.get(f"{attention}qkv.bias_mask")
    masked = mask is not None and not (mask.chunk(3)[1] == 1).any()
    if not masked and k.nan_to_num().any():
        raise InputError(f"{origin}: {attention}qkv.bias has a bias of the keys, which no DINOv3 of timm has")
    if f"{attention}q_bias" in dict(network.named_parameters()):
        return {f"{attention}q_bias": q, f"{attention}v_bias": v}
    if q.any() or v.any():
        raise InputError(
            f"{origin}: {attention}qkv.bias is not zero and this model has none; name the timm model that has, with "
            "_qkvb after dinov3"
        )
    return {}
