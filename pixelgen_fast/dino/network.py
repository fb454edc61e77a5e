"""DINOv2 and DINOv3 vision transformers, made by timm, with weights as people have them.

    load_dino(name, weights)      from the hub, a file of others (names.py), or a folder that `save_teacher` wrote

Meta's DINOv3 weights (arXiv 2508.10104) are under the DINOv3 License, DINOv2's (arXiv 2304.07193) under Apache 2.0;
neither comes with this package.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from pixelgen_fast.dino.names import to_timm
from pixelgen_fast.errors import InputError
from pixelgen_fast.weights import misfits, plain_names, read_file

RANDOM = "random"
# The settings that name a network and its weights, for messages.
KEYS = ("alignment.teacher", "alignment.weights")
_SECTIONS = ("state_dict", "model", "teacher")


Renaming = Callable[[Mapping[str, Tensor], nn.Module, str], dict[str, Tensor]]


def load_dino(
    name: str,
    weights: str | None,
    keys: tuple[str, str] = KEYS,
    *,
    rename: Renaming = to_timm,
    optional: Collection[str] = (),
    **kwargs: Any,
) -> nn.Module:
    """A vision transformer of timm with its weights, on the CPU in fp32, without a classifier.

    Under `torch.device("meta")`, where weights have no values, none are read or fetched.

    name: of timm, e.g. vit_base_patch14_dinov2.lvd142m or vit_small_patch16_dinov3.lvd1689m.
    weights: None for timm's own from the hub; "random" for a fixed random initialisation; a .safetensors or .pth file
    in timm's, Meta's or Hugging Face's key names; or a folder that `save_teacher` wrote, whose architecture is `name`.
    keys: the settings that hold the two, for messages. rename: names of a file to those of timm's network; other
    networks than a DINO have others. optional: weights that a file need not have. kwargs: for timm.create_model.
    Raises ValueError for an unknown name, a file that cannot be read, and weights that are missing, extra or misshapen;
    ImportError without timm.
    """
    meta = torch.get_default_device().type == "meta"
    if weights is None:
        return _create(name, keys, pretrained=not meta, **kwargs)
    path = Path(weights)
    if weights == RANDOM:
        return _create(name, keys, **kwargs)
    if not path.exists():
        raise InputError(
            f"{keys[1]} {weights}: no such file or folder; give a .safetensors or .pth file, a folder that "
            f"holds a teacher, {RANDOM!r}, or null to take them from the hub"
        )
    if not path.is_dir():
        network = _create(name, keys, **kwargs)
        if not meta:
            _fill(network, rename(_read_state(path), network, str(path)), str(path), optional)
        return network
    about = _read_about(path)
    if about["architecture"] != name:
        raise InputError(f"{path} holds a {about['architecture']}, not a {name}; name it so in {keys[0]}")
    overlay = {"mean": about["mean"], "std": about["std"]}
    network = _create(name, keys, pretrained_cfg_overlay=overlay, **kwargs | about["kwargs"])
    if not meta:
        _fill(network, rename(_read_state(path / "model.safetensors"), network, str(path)), str(path), optional)
    return network


def save_teacher(
    folder: str | Path,
    network: nn.Module,
    *,
    architecture: str,
    kwargs: Mapping[str, Any],
    mean: Sequence[float],
    std: Sequence[float],
    **more: Any,
) -> None:
    """Write model.safetensors and config.json, for `load_dino` to read.

    architecture, kwargs: what timm.create_model made the network from; plain types. mean, std: of its input channels.
    more: of its arguments, not written, for who will give them to `load_dino` too.
    Raises ValueError when the folder holds something already, or the network is not one of that architecture.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"{folder}: exists and is not empty; choose another folder or remove it")
    state = {name: value.detach().cpu().contiguous() for name, value in network.state_dict().items()}
    _fill(_create(architecture, **more | dict(kwargs)), state, f"a teacher to be saved as {architecture}")
    about = {"architecture": architecture, "kwargs": dict(kwargs), "mean": list(mean), "std": list(std)}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(about, indent=2) + "\n")


def copy_dino(
    name: str,
    weights: str | None,
    folder: str | Path,
    *,
    rename: Renaming = to_timm,
    optional: Collection[str] = (),
    **more: Any,
) -> None:
    """Write what `load_dino` gives with these arguments as a folder that it reads, with the keyword arguments again.

    Raises as that and `save_teacher` do.
    """
    network = load_dino(name, weights, rename=rename, optional=optional, **more)
    about = network.pretrained_cfg
    kwargs = _read_about(Path(weights))["kwargs"] if weights is not None and Path(weights).is_dir() else {}
    save_teacher(folder, network, architecture=name, kwargs=kwargs, mean=about["mean"], std=about["std"], **more)


def embed_patches(network: nn.Module, x: Tensor) -> Tensor:
    """What the first block reads: [class, registers, patches] with positions, of x [B, 3, side, side]."""
    tokens = network._pos_embed(network.patch_embed(x))
    return network.norm_pre(tokens[0] if isinstance(tokens, tuple) else tokens)


def rotary_table(network: nn.Module, grid: int) -> Tensor | None:
    """The rotary table of grid x grid patches, which blocks of a DINOv3 take; None for networks that rotate nothing."""
    rotary = getattr(network, "rope", None)
    return None if rotary is None else rotary.get_embed(shape=(grid, grid))


def block_outputs(network: nn.Module, tokens: Tensor, rope: Tensor | None) -> Iterator[Tensor]:
    """The tokens after each block, from those that the first one reads."""
    for block in network.blocks:
        tokens = block(tokens) if rope is None else block(tokens, rope)
        yield tokens


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


def _fill(network: nn.Module, state: Mapping[str, Tensor], origin: str, optional: Collection[str] = ()) -> None:
    if wrong := misfits(state, network.state_dict(), optional):
        raise InputError(f"{origin}: {len(wrong)} weights do not fit: {'; '.join(wrong[:10])}")
    network.load_state_dict(state, strict=not optional)


def _read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name; they may lie under a name of the code that trained them."""
    state = read_file(path)
    for name in _SECTIONS:
        state = state[name] if isinstance(state.get(name), dict) else state
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(f"{path}: holds {', '.join(map(str, list(state)[:5]))} instead of weights by name")
    return plain_names({name.removeprefix("backbone."): value for name, value in state.items()}, str(path))


def _read_about(folder: Path) -> dict[str, Any]:
    try:
        about = json.loads((folder / "config.json").read_text())
        missing = {"architecture", "kwargs", "mean", "std"} - about.keys()
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{folder}: holds no readable config.json of a teacher: {error}") from error
    if missing:
        raise InputError(f"{folder / 'config.json'}: lacks {', '.join(sorted(missing))}")
    return about
