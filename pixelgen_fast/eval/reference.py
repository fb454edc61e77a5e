"""What is kept of real images that generated ones are compared with: moments of their features, and some features.

    <name>.npz   mu, sigma              of the pooled features, float64 [D], [D, D]      FID
                 mu_s, sigma_s          of the spatial ones                              sFID
                 mu_dino, sigma_dino    of DINOv2's                                      FD-DINOv2
                 features               pooled ones of at most 10,000 images, evenly     precision, recall
                                        spread over them, float32 [K, D]
                 about                  JSON: name, crop, size, count, sha256 of the pixels as they were judged, and
                                        the extractor with the sha256 of each network's file

A file of others with mu and sigma alone, or with mu_s and sigma_s as ADM's have, is a reference too; what it does not
hold leaves its numbers out.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from pixelgen_fast.atomic import replaced
from pixelgen_fast.errors import InputError
from pixelgen_fast.eval.features import DINO_TOKEN, POOL, SPATIAL, FeatureNetworks
from pixelgen_fast.eval.moments import Moments
from pixelgen_fast.eval.sources import Content, Source

MANIFOLD = 10_000
# the names of mean and covariance in a file, by the features that they are of
KEYS = {POOL: ("mu", "sigma"), SPATIAL: ("mu_s", "sigma_s"), DINO_TOKEN: ("mu_dino", "sigma_dino")}


@dataclass(frozen=True)
class Reference:
    """moments: (mean, covariance) by the name of the features, POOL always there. manifold: pooled features [K, D], or
    None. about: see above; a file of others has name and the sha256 of itself only."""

    moments: dict[str, tuple[np.ndarray, np.ndarray]]
    manifold: Tensor | None
    about: dict[str, Any]

    def line(self, count: int | None = None) -> str:
        """What it is, in words that stand beside a number. count: of images, where not all were used."""
        a, count = self.about, count or self.about.get("count")
        images = "an unstated number of images" if count is None else f"{count:,} images"
        crop = a.get("crop") or ("crop unstated" if a.get("count") is None else "not cropped")
        return f"{images} of {a['name']}, {crop}, sha256 {a['sha256'][:16]}"


def measure_reference(
    source: Source, networks: FeatureNetworks, *, batch: int = 64, progress: bool = False
) -> Reference:
    """The reference that images are. Raises what reading them raises."""
    moments: dict[str, Moments] = {}
    kept: list[Tensor] = []
    content, at, count = Content(), 0, len(source)
    chosen = {k * count // min(count, MANIFOLD) for k in range(min(count, MANIFOLD))}
    with tqdm(total=count, desc="features", unit="img", disable=not progress) as bar:
        for images in source.batches(batch):
            content.add(images)
            features = networks(images)
            for name in features.keys() & KEYS.keys():
                moments.setdefault(name, Moments()).add(features[name])
            kept.append(features[POOL][[k for k in range(len(images)) if at + k in chosen]])
            at += len(images)
            bar.update(len(images))
    height, width = images.shape[1:3]
    about = {"name": source.name, "crop": source.crop, "size": [height, width], "count": count}
    about |= {"sha256": content.text(), **networks.about}
    return Reference({name: found.result() for name, found in moments.items()}, torch.cat(kept), about)


def write_reference(reference: Reference, path: str | Path) -> Path:
    """Write a reference whole or not at all. Raises InputError for a path that is not named .npz."""
    path = Path(path).expanduser()
    check_name(path)
    arrays = {key: a for name, pair in reference.moments.items() for key, a in zip(KEYS[name], pair, strict=True)}
    if reference.manifold is not None:
        arrays["features"] = reference.manifold.numpy()
    with replaced(path) as work, work.open("wb") as file:
        np.savez(file, about=json.dumps(reference.about), **arrays)
    return path


def check_name(path: Path) -> None:
    if path.suffix != ".npz":
        raise InputError(f"a statistics file is named .npz, got {path}")


def is_statistics(images: Any) -> bool:
    """Whether a reference is a file of statistics, by its name."""
    return not isinstance(images, Tensor) and Path(images).suffix == ".npz"


def read_reference(path: str | Path) -> Reference:
    """What `write_reference` wrote, or others. Raises FileNotFoundError, and InputError for what is no such file."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(
            f"statistics file {path} does not exist; `pixelgen data reference ROOT {path}` makes one of images"
        )
    try:
        with np.load(path, allow_pickle=False) as file:
            wanted = {"about", "features", *(key for pair in KEYS.values() for key in pair)}
            arrays = {key: file[key] for key in file.files if key in wanted}
            present = sorted(file.files)
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} is no .npz file that can be read: {error}") from error
    if not {"mu", "sigma"} <= arrays.keys():
        raise InputError(f"{path} holds {present}; a statistics file needs mu and sigma")
    moments = {}
    for name, (mean, covariance) in KEYS.items():
        if mean in arrays and covariance in arrays:
            moments[name] = _pair(path, mean, arrays[mean], covariance, arrays[covariance])
    features = arrays.get("features")
    if features is not None and features.shape[1:] != arrays["mu"].shape:
        raise InputError(f"{path}: features must be [K, {len(arrays['mu'])}] as mu is, got {list(features.shape)}")
    manifold = None if features is None else torch.from_numpy(features.astype(np.float32))
    return Reference(moments, manifold, _about(path, arrays.get("about")))


def _pair(path: Path, mean: str, mu: np.ndarray, covariance: str, sigma: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
        raise InputError(
            f"{path}: {mean} must be [D] and {covariance} [D, D], got {list(mu.shape)} and {list(sigma.shape)}"
        )
    return mu.astype(np.float64), sigma.astype(np.float64)


def _about(path: Path, text: np.ndarray | None) -> dict[str, Any]:
    """What a file says of itself; of one of others, its name and checksum."""
    if text is None:
        with path.open("rb") as file:
            return {"name": path.name, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
    try:
        about = json.loads(str(text))
        return {**about, "name": f"{about['name']} ({path.name})", "sha256": str(about["sha256"])}
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: about is not what `pixelgen data reference` writes: {error!r}") from error


def check_fits(reference: Reference, networks: FeatureNetworks, size: int | None) -> None:
    """Raise InputError for a reference of other networks, or of images of another size than `size`."""
    name, about = reference.about["name"], reference.about
    for which in ("inception", "dino"):
        key = f"{which}_sha256"
        theirs, own = about.get(key), networks.about[key]
        if theirs is not None and own is not None and theirs != own:
            raise InputError(
                f"{name} was made with other weights of {which} (sha256 {theirs[:16]}, not {own[:16]}): name their "
                f"file with --{which}, or make the reference again"
            )
    if size is not None and about.get("size") not in (None, [size, size]):
        height, width = about["size"]
        raise InputError(f"{name} is of images of {height} x {width} pixels, and these have {size} x {size}")
    found = networks(torch.zeros(1, 32, 32, 3, dtype=torch.uint8))
    for features, (mean, _) in reference.moments.items():
        if features in found and len(mean) != found[features].shape[1]:
            layer = networks.layers.get(features, features)
            raise InputError(
                f"{name} holds {len(mean)} features, {networks.extractor} layer {layer} has "
                f"{found[features].shape[1]}; use the statistics of this extractor"
            )
