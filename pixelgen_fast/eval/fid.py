"""FID, sFID, Inception Score, precision, recall and FD-DINOv2 of one set of images, from one pass over them.

    FID, sFID, FD-DINOv2   Fréchet distances of the pooled, spatial and DINOv2 features (features.py; Heusel et al.,
                           arXiv 1706.08500)
    Inception Score        exp E KL(p(y|x) | p(y)), ten splits (Salimans et al., arXiv 1606.03498)
    precision, recall      share of generated (real) features inside the real (generated) manifold of nearest-neighbour
                           balls, k = 3, in the pooled features (Kynkäänniemi et al., arXiv 1904.06991); of real
                           images at most 10,000, of generated ones all, as ADM's evaluator has it

FID, Inception Score, precision and recall are computed by torch-fidelity. The reference is a data set of real images,
anything that training reads, or a file (reference.py). Real images are cropped as for training to the side of the
generated ones. A figure means nothing without its protocol, so each line of the report says what it is of: counts,
crop and checksum.

Shapes: N images uint8 [N, H, W, 3] or a data set on disk; D features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from pixelgen_fast.errors import InputError
from pixelgen_fast.eval.features import DINO_TOKEN, INCEPTION, LOGITS, POOL, SPATIAL, FeatureNetworks
from pixelgen_fast.eval.frechet import frechet_of_moments
from pixelgen_fast.eval.moments import Moments
from pixelgen_fast.eval.reference import (
    KEYS,
    Reference,
    check_fits,
    check_name,
    is_statistics,
    measure_reference,
    read_reference,
    write_reference,
)
from pixelgen_fast.eval.sources import LEAST, Images, Source, open_source, side_of
from pixelgen_fast.settings import Crop


@dataclass(frozen=True)
class FidReport:
    """Figures of generated images against a reference. One that cannot be had is None, and left_out says why.

    reference: what it is, as Reference.about says; real_count: of the real images for precision and recall. against:
    what stands beside each number, against_manifold beside those two.
    """

    fid: float
    sfid: float | None
    inception_score: float
    inception_score_std: float
    precision: float | None
    recall: float | None
    fd_dinov2: float | None
    generated: str
    generated_count: int
    reference: dict[str, Any]
    real_count: int | None
    extractor: str
    left_out: tuple[str, ...]
    against: str
    against_manifold: str

    def as_dict(self) -> dict[str, Any]:
        """The report as plain types, for JSON."""
        return asdict(self) | {"left_out": [*self.left_out]}

    def figures(self) -> dict[str, float | None]:
        """The numbers by their names, the one that counts first."""
        return {
            "FID": self.fid,
            "sFID": self.sfid,
            "IS": self.inception_score,
            "precision": self.precision,
            "recall": self.recall,
            "FD-DINOv2": self.fd_dinov2,
        }

    def lines(self) -> list[str]:
        """The report in words, one line each."""
        lines, drawn = [], f"{self.generated_count:,} images"
        for name, value in self.figures().items():
            if value is None:
                continue
            of = f"{drawn} against {self.against_manifold if name in ('precision', 'recall') else self.against}"
            text = f"{value:.4g}"
            if name == "IS":
                text, of = f"{value:.4g} +- {self.inception_score_std:.2g}", drawn
            lines.append(f"{name:<10} {text:<14} {of}")
        return [
            *lines,
            *self.left_out,
            f"generated  {self.generated_count:,} images, {self.generated}",
            f"reference  {self.against}",
            f"extractor  {self.extractor}; figures of another evaluation suite differ by up to 0.1 FID",
        ]


def extract(source: Source, networks: FeatureNetworks, batch: int, progress: bool) -> dict[str, Tensor]:
    """All features of images, float32 [N, D] by name."""
    parts: dict[str, list[Tensor]] = {}
    with tqdm(total=len(source), desc="features", unit="img", disable=not progress) as bar:
        for images in source.batches(batch):
            for name, values in networks(images).items():
                parts.setdefault(name, []).append(values)
            bar.update(len(images))
    return {name: torch.cat(values) for name, values in parts.items()}


def judge(features: Mapping[str, Tensor], reference: Reference, networks: FeatureNetworks, generated: str) -> FidReport:
    """The report on features float32 [N, D] by name. generated: what they are of, for people.

    Raises InputError for fewer than ten images.
    """
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric

    count = len(features[POOL])
    if count < LEAST:
        raise InputError(
            f"at least {LEAST} images are needed (the Inception Score has ten splits), found {count} images"
        )
    score = isc_features_to_metric(features[LOGITS])
    distances = {name: _distance(name, features, reference) for name in KEYS}
    precision, recall = _manifolds(features[POOL].to(networks.device), reference.manifold)
    real = None if reference.manifold is None else len(reference.manifold)
    return FidReport(
        fid=distances[POOL],
        sfid=distances[SPATIAL],
        inception_score=score[KEY_METRIC_ISC_MEAN],
        inception_score_std=score[KEY_METRIC_ISC_STD],
        precision=precision,
        recall=recall,
        fd_dinov2=distances[DINO_TOKEN],
        generated=generated,
        generated_count=count,
        reference=reference.about,
        real_count=real,
        extractor=networks.about["extractor"],
        left_out=tuple(_left_out(features, reference)),
        against=reference.line(),
        against_manifold=reference.line(real),
    )


def _distance(name: str, features: Mapping[str, Tensor], reference: Reference) -> float | None:
    """The Fréchet distance in one kind of features; None where a side has none."""
    if name not in features or name not in reference.moments:
        return None
    own = Moments()
    own.add(features[name])
    if name != POOL:
        return frechet_of_moments(*own.result(), *reference.moments[name])
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

    sides = (dict(zip(("mu", "sigma"), pair, strict=True)) for pair in (own.result(), reference.moments[name]))
    return fid_statistics_to_metric(*sides, verbose=False)[KEY_METRIC_FID]


def _manifolds(generated: Tensor, real: Tensor | None) -> tuple[float | None, float | None]:
    """Precision and recall."""
    if real is None:
        return None, None
    from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

    found = prc_features_to_metric(generated, real.to(generated.device), save_cpu_ram=True, verbose=False)
    return found[KEY_METRIC_PRECISION], found[KEY_METRIC_RECALL]


def _left_out(features: Mapping[str, Tensor], reference: Reference) -> list[str]:
    """Why numbers are missing, one line each."""
    name, lines = reference.about["name"], []
    if SPATIAL not in features:
        lines.append("sFID is left out: this extractor has no block mixed_6")
    elif SPATIAL not in reference.moments:
        lines.append(f"sFID is left out: {name} holds no mu_s and sigma_s")
    if reference.manifold is None:
        lines.append(f"precision and recall are left out: {name} holds no features of single images")
    if DINO_TOKEN not in features:
        lines.append("FD-DINOv2 is left out: --dino names no file of DINOv2 ViT-L/14")
    elif DINO_TOKEN not in reference.moments:
        lines.append(f"FD-DINOv2 is left out: {name} holds no mu_dino and sigma_dino")
    return lines


def evaluate_fid(
    images: Images,
    reference: Images,
    *,
    weights: str | Path | None = None,
    extractor: str = INCEPTION,
    dino: str | Path | None = None,
    device: torch.device | str = "cpu",
    batch: int = 64,
    progress: bool = False,
) -> FidReport:
    """Compare generated images with real ones, or with a statistics file of real ones.

    images: uint8 [N, H, W, 3], or a data set of images of one size. reference: the same, or a .npz file; one on disk is
    cropped to H pixels where H = W is known.
    weights, extractor, dino: see FeatureNetworks.
    Raises ImportError without torch-fidelity, FileNotFoundError for a missing file or folder, ValueError for a file or
    images that cannot be used, naming what cannot be read, ConnectionError if the weights cannot be downloaded.
    """
    source, side = open_source(images), side_of(images)
    networks = FeatureNetworks(extractor, weights, dino, device)
    found = open_reference(reference, networks, size=side, batch=batch, progress=progress)
    return judge(extract(source, networks, batch, progress), found, networks, source.name)


def open_reference(
    reference: Images, networks: FeatureNetworks, *, size: int | None, batch: int = 64, progress: bool = False
) -> Reference:
    """A reference that is ready to be compared with: what its file holds, or what is measured of its images now.

    size: the side of the images to compare; None for one that is not known. Raises as `evaluate_fid` does.
    """
    if not is_statistics(reference):
        return measure_reference(open_source(reference, size), networks, batch=batch, progress=progress)
    found = read_reference(reference)
    check_fits(found, networks, size)
    return found


def check_reference(reference: Images, networks: FeatureNetworks, *, size: int | None = None) -> Reference | None:
    """Raise what `open_reference` would raise: to be called before images are drawn. Returns what a file holds.

    size: the side of the images that will be drawn; None takes the reference as it is. All files of a reference are
    read, but not decoded.
    """
    if is_statistics(reference):
        return open_reference(reference, networks, size=size)
    open_source(reference, size).check_sizes()
    return None


def write_statistics(
    images: Images,
    path: str | Path,
    networks: FeatureNetworks,
    *,
    size: int | None = None,
    crop: Crop = "adm",
    batch: int = 64,
    progress: bool = False,
) -> Reference:
    """Write the reference that images are, as a file; returns it. size: the side to crop to; None leaves them.

    A process that is killed leaves no file. Raises as `evaluate_fid` does.
    """
    check_name(Path(path))
    source = open_source(images, size, crop)
    source.check_sizes()
    found = measure_reference(source, networks, batch=batch, progress=progress)
    write_reference(found, path)
    return found
