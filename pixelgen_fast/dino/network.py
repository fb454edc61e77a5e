"""DINOv2 and DINOv3 vision transformers, made by timm, with weights as people have them.

    load_dino(name, weights)      from the hub, a file in timm's or Meta's names, or a folder that `save_dino` wrote

Meta's DINOv3 weights (arXiv 2508.10104) are under the DINOv3 License, DINOv2's (arXiv 2304.07193) under Apache 2.0;
neither comes with this package.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pixelgen_fast.errors import InputError
from pixelgen_fast.weights import misfits

RANDOM = "random"
# The settings that name a network and its weights, for messages.
KEYS = ("alignment.teacher", "alignment.weights")
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


def load_dino(name: str, weights: str | None, keys: tuple[str, str] = KEYS) -> nn.Module:
    """A vision transformer of timm with its weights, on the CPU in fp32, without a classifier.

    Under `torch.device("meta")`, where weights have no values, none are read or fetched.

    name: of timm, e.g. vit_base_patch14_dinov2.lvd142m or vit_small_patch16_dinov3.lvd1689m.
    weights: None for timm's own from the hub; "random" for a fixed random initialisation; a .safetensors or .pth file
    in timm's or Meta's key names; or a folder that `save_teacher` wrote, whose architecture is `name`.
    keys: the settings that hold the two, for messages.
    Raises ValueError for an unknown name, a file that cannot be read, and weights that are missing, extra or misshapen;
    ImportError without timm.
    """
    meta = torch.get_default_device().type == "meta"
    if weights is None:
        return _create(name, keys, pretrained=not meta)
    path = Path(weights)
    if weights == RANDOM:
        return _create(name, keys)
    if not path.exists():
        raise InputError(
            f"{keys[1]} {weights}: no such file or folder; give a .safetensors or .pth file, a folder that "
            f"holds a teacher, {RANDOM!r}, or null to take them from the hub"
        )
    if not path.is_dir():
        network = _create(name, keys)
        if not meta:
            _fill(network, to_timm(_read_state(path), network, str(path)), str(path))
        return network
    about = _read_about(path)
    if about["architecture"] != name:
        raise InputError(f"{path} holds a {about['architecture']}, not a {name}; name it so in {keys[0]}")
    overlay = {"mean": about["mean"], "std": about["std"]}
    network = _create(name, keys, pretrained_cfg_overlay=overlay, **about["kwargs"])
    if not meta:
        _fill(network, to_timm(_read_state(path / "model.safetensors"), network, str(path)), str(path))
    return network


def save_teacher(
    folder: str | Path,
    network: nn.Module,
    *,
    architecture: str,
    kwargs: Mapping[str, Any],
    mean: Sequence[float],
    std: Sequence[float],
) -> None:
    """Write model.safetensors and config.json, for `load_dino` to read.

    architecture, kwargs: what timm.create_model made the network from; plain types. mean, std: of its input channels.
    Raises ValueError when the folder holds something already, or the network is not one of that architecture.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"{folder}: exists and is not empty; choose another folder or remove it")
    state = {name: value.detach().cpu().contiguous() for name, value in network.state_dict().items()}
    _fill(_create(architecture, **kwargs), state, f"a teacher to be saved as {architecture}")
    about = {"architecture": architecture, "kwargs": dict(kwargs), "mean": list(mean), "std": list(std)}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(about, indent=2) + "\n")


def copy_dino(name: str, weights: str | None, folder: str | Path) -> None:
    """Write what `load_dino(name, weights)` gives as a folder that it reads. Raises as that and `save_teacher` do."""
    network = load_dino(name, weights)
    about = network.pretrained_cfg
    kwargs = _read_about(Path(weights))["kwargs"] if weights is not None and Path(weights).is_dir() else {}
    save_teacher(folder, network, architecture=name, kwargs=kwargs, mean=about["mean"], std=about["std"])


def to_timm(state: Mapping[str, Tensor], network: nn.Module, origin: str) -> dict[str, Tensor]:
    """Weights under Meta's names renamed to those of timm's `network`; other weights as they are.

    DINOv3: `storage_tokens`, LayerScale and SwiGLU have other names, and qkv.bias is split where the network has biases
    (the timm models named _qkvb): that of the keys is masked out. DINOv2 with registers: timm adds no position to the
    class token, so the position that Meta adds is part of it.
    Raises ValueError, naming `origin`, for biases that the network has no place for.
    """
    if not state.keys() & {"storage_tokens", "register_tokens", "mask_token"}:
        return dict(state)
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


def _create(name: str, keys: tuple[str, str] = KEYS, **kwargs: Any) -> nn.Module:
    """A timm model with a fixed input size and no classifier, its random weights the same each time."""
    try:
        import timm
    except ImportError as error:
        raise ImportError(f"{keys[0]} needs timm: pip install pixelgen_fast[teacher]") from error
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models("*dino*"), n=3, cutoff=0.3)
        raise InputError(f"{keys[0]} {name!r} is not a model of timm {timm.__version__}; near: {near}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            return timm.create_model(name, num_classes=0, **{**kwargs, "dynamic_img_size": False})
        except TypeError as error:
            raise InputError(f"{keys[0]} {name}: not a vision transformer, or of other settings: {error}") from error
        except Exception as error:
            if not kwargs.get("pretrained"):
                raise
            raise InputError(
                f"{keys[0]} {name}: its weights could not be fetched ({error}); download the file and name it "
                f"in {keys[1]}"
            ) from error


def _fill(network: nn.Module, state: Mapping[str, Tensor], origin: str) -> None:
    if wrong := misfits(state, network.state_dict()):
        raise InputError(f"{origin}: {len(wrong)} weights do not fit: {'; '.join(wrong[:10])}")
    network.load_state_dict(state)


def _read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name; those of a .pth file may lie under "state_dict" or "model"."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
        state = content.get("state_dict", content.get("model", content))
    except Exception as error:  # torch raises whatever the bytes lead it to
        raise InputError(f"{path}: not a readable file of weights; give a .safetensors or .pth file") from error
    if not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(f"{path}: holds {', '.join(map(str, list(state)[:5]))} instead of weights by name")
    return state


def _read_about(folder: Path) -> dict[str, Any]:
    try:
        about = json.loads((folder / "config.json").read_text())
        missing = {"architecture", "kwargs", "mean", "std"} - about.keys()
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{folder}: holds no readable config.json of a teacher: {error}") from error
    if missing:
        raise InputError(f"{folder / 'config.json'}: lacks {', '.join(sorted(missing))}")
    return about
