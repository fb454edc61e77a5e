"""How well a decoder turns latents back into the images that they are of.

    PSNR     mean over images of 10 log10(255^2 / mean squared error), of 8-bit images
    LPIPS    mean over images (arXiv 1801.03924)
    rFID     FID of the decoded images to those same images; digits are judged as generated ones are (eval/digits.py)

Images are cropped to the decoder's size as for training, encoded without noise, decoded, and rounded to 8 bits. Images
and what is decoded of them are held in memory, 6 S^2 bytes each: 20 GB for 50,000 of 256 pixels.
Shapes: N images uint8 [N, S, S, 3].
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from pixelgen_fast import config as cfg
from pixelgen_fast import hub
from pixelgen_fast.data.dali import Loader
from pixelgen_fast.data.order import Order
from pixelgen_fast.data.roots import DIGITS, open_root
from pixelgen_fast.decoding.perceptual import NO_LPIPS, Perceptual
from pixelgen_fast.decoding.schema import DECODER
from pixelgen_fast.diffusion.path import to_unit
from pixelgen_fast.diffusion.solver import to_uint8
from pixelgen_fast.errors import InputError
from pixelgen_fast.eval.digits import DigitsReport, evaluate_digits
from pixelgen_fast.eval.features import FeatureNetworks
from pixelgen_fast.eval.fid import FidReport, check_reference, evaluate_fid
from pixelgen_fast.rae.autoencoder import Autoencoder, load_autoencoder
from pixelgen_fast.rae.files import read_about

_SEED = 0


@dataclass(frozen=True)
class ReconstructionReport:
    """Of `count` images. psnr in dB. lpips: None where it was not asked for. distribution: of the decoded images."""

    count: int
    psnr: float
    lpips: float | None
    distribution: DigitsReport | FidReport

    def as_dict(self) -> dict[str, Any]:
        """The report as plain types, for JSON."""
        return {**vars(self), "distribution": self.distribution.as_dict()}

    def lines(self) -> list[str]:
        """The report in words, one line each."""
        lpips = "" if self.lpips is None else f"   LPIPS {self.lpips:.4f}"
        head = f"{self.count:,} images, encoded and decoded: PSNR {self.psnr:.2f} dB{lpips}"
        return [head, "the decoded ones as a set (rFID where it is an FID):", *self.distribution.lines()]


def decoder_folder(path: str | Path) -> Path | None:
    """The decoder's folder that a path means: itself, or the one in a decoder's run; None where there is none."""
    path = hub.local(path)
    for folder in (path, path / DECODER):
        try:
            read_about(folder)
        except InputError:
            continue
        return folder
    return None


def evaluate_decoder(
    folder: Path,
    *,
    root: str | None,
    count: int | None,
    batch: int,
    vgg: str | None,
    inception: str | None,
    device: str,
) -> tuple[ReconstructionReport, dict[str, Any]]:
    """Judge a decoder's folder; returns the report and what it was judged on.

    root: a data set; None for the one that the decoder was trained on. count: the first so many of its images, in a
    fixed random order; None for all. vgg: as Perceptual takes it, "none" for no LPIPS; None for what the decoder was
    trained with. inception: file of weights.
    Raises InputError for a folder without an encoder, and for more images than there are.
    """
    about = read_about(folder)
    rae = load_autoencoder(None, decoder=str(folder))
    if rae.encoder is None:
        raise InputError(f"{folder}: holds no encoder, and nothing else says whose latents it decodes")
    data = about.get("data", {})
    root = root or data.get("root")
    if root is None:
        raise InputError(f"{folder}: does not say what it was trained on; name a data set with --reference")
    size, index = rae.decoder.image_size, open_root(root)
    if count is not None and not 2 <= count <= len(index):
        raise InputError(f"--samples is {count}, and {root} has {len(index):,} images; give 2 to that many")
    if root != DIGITS:
        check_reference(str(index.root), FeatureNetworks(weights=inception), size=size)
    vgg = about.get("vgg") if vgg is None else vgg
    perceptual = None if vgg == NO_LPIPS else Perceptual(vgg, "--vgg").to(device)
    settings = cfg.Data(root=root, image_size=size, crop=data.get("crop", "adm"), workers=0)
    count = count or len(index)
    loader = Loader(index, Order(_SEED, batch, batch), settings, device)
    with loader:
        images, decoded, labels, lpips = _decode_all(rae.to(device), loader, count, perceptual)
    if root == DIGITS:
        distribution: DigitsReport | FidReport = evaluate_digits(decoded, labels)
    else:
        distribution = evaluate_fid(decoded, images, weights=inception, device=device, progress=True)
    report = ReconstructionReport(count, psnr(decoded, images), lpips, distribution)
    return report, {"root": root, "image_size": size, "weights": about.get("weights"), "nimg": about.get("nimg")}


def psnr(a: Tensor, b: Tensor) -> float:
    """Mean over images uint8 [N, S, S, 3], in dB; images that are the same count as one step off in one number."""
    parts = [_psnr(x, y) for x, y in zip(a.split(256), b.split(256), strict=True)]
    return float(np.mean(np.concatenate(parts)))


def _psnr(a: Tensor, b: Tensor) -> np.ndarray:
    errors = (a.double() - b.double()).square().flatten(1).mean(dim=1).clamp(min=1 / a[0].numel())
    return (10 * torch.log10(255**2 / errors)).numpy()


@torch.no_grad()
def _decode_all(
    rae: Autoencoder, loader: Loader, count: int, perceptual: Perceptual | None
) -> tuple[Tensor, Tensor, Tensor, float | None]:
    """Images, what is decoded of them, labels; and mean LPIPS."""
    parts: list[tuple[Tensor, ...]] = []
    total = 0.0
    for images, labels in _first(loader, count):
        decoded = to_uint8(rae.decode(rae.encode(images)))
        if perceptual is not None:
            total += float(perceptual(to_unit(decoded), to_unit(images)).sum())
        parts.append((images.cpu(), decoded.cpu(), labels.cpu()))
    images, decoded, labels = (torch.cat(column) for column in zip(*parts, strict=True))
    return images, decoded, labels, None if perceptual is None else total / count


def _first(loader: Loader, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The first `count` images of a loader, and their labels."""
    with tqdm(total=count, desc="decode", unit="img") as bar:
        while bar.n < count:
            images, labels, _ = next(loader)
            left = count - bar.n
            yield images[:left], labels[:left]
            bar.update(min(left, len(images)))
