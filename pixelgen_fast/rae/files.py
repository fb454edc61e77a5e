"""What RAE has on disk: decoders and the statistics of latents, ours and the published ones.

    <decoder>/model.safetensors, config.json      of `pixelgen decoder`: weights, and what they are of
              encoder/                            the encoder whose latents it decodes
    <statistics>.safetensors                      mean and var [C, n, n], and in the header what they are of
    model.pt, stat.pt                             as published: a decoder's state dict; {mean, var}

Shapes: C latent channels, n x n latent tokens.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from pixelgen_fast import hub
from pixelgen_fast.atomic import replaced
from pixelgen_fast.data.cache import published_folder
from pixelgen_fast.errors import InputError
from pixelgen_fast.rae import names
from pixelgen_fast.rae.decoder import Decoder, DecoderSettings
from pixelgen_fast.rae.encoder import Encoder
from pixelgen_fast.weights import misfits, plain_names, read_file

WEIGHTS, ABOUT, ENCODER = "model.safetensors", "config.json", "encoder"
FORMAT = "pixelgen_fast decoder 1"
# what training checkpoints of the published code hold, and what stands before a decoder's names in them
_SECTIONS, _PREFIX = ("ema", "model"), "decoder."
_OF = "of"


class Statistics(NamedTuple):
    """Mean and variance of each element of the latents, [C, n, n]."""

    mean: Tensor
    var: Tensor


Channels = tuple[Sequence[float], Sequence[float]]


def save_decoder(folder: Path, decoder: Decoder, about: Mapping[str, Any], encoder: Path | None = None) -> None:
    """Write a decoder's folder, in place of an older one.

    about: more of what it is, plain types. encoder: a folder of `copy_encoder` to be copied into it; `about` then has
    {"encoder": {"network", "layers"}}.
    """
    own = {
        "format": FORMAT,
        "settings": asdict(decoder.settings),
        "latent_dim": decoder.latent_dim,
        "grid": decoder.grid,
        "mean": decoder.mean.flatten().tolist(),
        "std": decoder.std.flatten().tolist(),
    }
    state = {name: value.detach().cpu().contiguous() for name, value in decoder.state_dict().items()}
    with published_folder(folder) as work:
        save_file(state, work / WEIGHTS)
        if encoder is not None:
            shutil.copytree(encoder, work / ENCODER)
        (work / ABOUT).write_text(json.dumps({**about, **own}, indent=2) + "\n")


def load_decoder(path: str | Path, channels: Channels | None = None) -> Decoder:
    """The decoder in a folder that `save_decoder` wrote, or in a published file, on the CPU in float32.

    Under torch.device("meta") its shapes alone. channels: mean and deviation of the pixels of a published decoder, None
    for none. Raises InputError for what is not there, cannot be read, or does not fit.
    """
    path = hub.local(path)
    meta = torch.get_default_device().type == "meta"
    if path.is_dir():
        about = read_about(path)
        settings, state = DecoderSettings(**about["settings"]), None if meta else _read_weights(path / WEIGHTS)
        size, channels = (about["latent_dim"], about["grid"]), (about["mean"], about["std"])
    else:
        with torch.device("cpu"):
            public = _published_state(path)
            settings, *size = names.published_decoder(public, str(path))
            state = names.decoder_to_native(public)
    decoder = Decoder(settings, *size, *(channels or ()))
    if state is not None and (wrong := misfits(state, decoder.state_dict())):
        raise InputError(f"{path}: {len(wrong)} weights do not fit the decoder: {'; '.join(wrong[:10])}")
    if not meta:
        decoder.load_state_dict(state)
    return decoder


def read_about(folder: Path) -> dict[str, Any]:
    """config.json of a decoder's folder. Raises InputError for one that is missing, damaged or of another format."""
    try:
        about = json.loads((folder / ABOUT).read_text())
        if not isinstance(about, dict) or about.get("format") != FORMAT:
            raise ValueError(f"it is not of the format {FORMAT!r}")
        DecoderSettings(**about["settings"])
        int(about["latent_dim"]), int(about["grid"]), len(about["mean"]), len(about["std"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder}: holds no readable {ABOUT} of a decoder: {error}") from error
    return about


def publish_decoder(folder: Path, out: Path, dtype: torch.dtype) -> Path:
    """Write the decoder of a folder under its published names, position table and all; returns the file.

    Raises InputError for an `out` that holds something.
    """
    if out.exists() and any(out.iterdir()):
        raise InputError(f"{out}: exists and is not empty; choose another folder or remove it")
    decoder = load_decoder(folder)
    public = names.decoder_to_public(decoder.state_dict(), decoder.grid)
    out.mkdir(parents=True, exist_ok=True)
    save_file({name: value.to(dtype).contiguous() for name, value in public.items()}, out / WEIGHTS)
    return out / WEIGHTS


def own_encoder(path: str | Path) -> tuple[str, str, list[int]] | None:
    """(network, weights, layers) of the encoder that a decoder's folder holds; None where it holds none."""
    path = hub.local(path)
    if not (path / ENCODER).is_dir():
        return None
    encoder = read_about(path).get("encoder")
    if not isinstance(encoder, dict) or not {"network", "layers"} <= encoder.keys():
        raise InputError(f"{path}: holds an encoder, and {ABOUT} does not say which")
    return encoder["network"], str(path / ENCODER), encoder["layers"]


def write_statistics(path: Path, statistics: Statistics, about: Mapping[str, Any]) -> None:
    """Write a statistics file whole. about: what it is of, plain types; `encoder`, a fingerprint, is compared later."""
    tensors = {name: value.float().cpu().contiguous() for name, value in statistics._asdict().items()}
    with replaced(path) as work:
        save_file(tensors, work, metadata={_OF: json.dumps(about)})


def read_statistics(path: str | Path, encoder: Encoder | None = None) -> Statistics:
    """The statistics in a file that `write_statistics` wrote, or in a published one; on the CPU in float32.

    encoder: whose latents they must be of, where the file says it. Under torch.device("meta") only shapes are compared.
    Raises InputError for a file that is missing, holds something else, or is of another encoder.
    """
    path = hub.local(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file of latent statistics; pixelgen latents makes one")
    with torch.device("cpu"):
        content = read_file(path)
    found = [content.get(name) for name in Statistics._fields]
    if not all(isinstance(value, Tensor) for value in found):
        raise InputError(f"{path}: holds {', '.join(map(str, list(content)[:5]))} instead of mean and var of latents")
    mean, var = (value.float()[0] if value.ndim == 4 and len(value) == 1 else value.float() for value in found)
    if mean.ndim != 3 or mean.shape != var.shape or not (torch.isfinite(mean).all() and (var >= 0).all()):
        raise InputError(f"{path}: mean {list(mean.shape)} and var {list(var.shape)} are no statistics [C, n, n]")
    fits = encoder is not None and mean.shape == (encoder.width, encoder.grid, encoder.grid)
    origin = statistics_about(path).get("encoder") if fits and not encoder.mean.is_meta else None
    if origin is not None and origin != encoder.fingerprint():
        raise InputError(f"{path}: are of another encoder than this one; make its own with pixelgen latents")
    return Statistics(*(value.to(torch.get_default_device()) for value in (mean, var)))


def statistics_about(path: Path) -> dict[str, Any]:
    """What a statistics file says that it is of; empty of a published one."""
    try:
        with safe_open(path, framework="pt") as file:
            return json.loads((file.metadata() or {}).get(_OF, "{}"))
    except (SafetensorError, ValueError):
        return {}


def _read_weights(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: not a readable file of weights: {error}") from error


def _published_state(path: Path) -> dict[str, Tensor]:
    """The decoder's weights in a published file, under their published names."""
    if not path.is_file():
        raise InputError(f"{path}: no such file or folder of a decoder")
    content = read_file(path)
    content = next((content[name] for name in _SECTIONS if isinstance(content.get(name), dict)), content)
    state = plain_names({name: v for name, v in content.items() if isinstance(v, Tensor)}, str(path))
    inside = {name.removeprefix(_PREFIX): v for name, v in state.items() if name.startswith(_PREFIX)}
    return inside or state
