"""FID, Inception Score, precision and recall, all computed by torch-fidelity; no network is re-implemented here.

    FID                Fréchet distance of the 2048 pooled Inception features (Heusel et al., arXiv 1706.08500)
    Inception Score    exp E KL(p(y|x) | p(y)), ten splits (Salimans et al., arXiv 1606.03498)
    precision, recall  share of generated (real) features inside the real (generated) manifold of nearest-neighbour
                       balls, k = 3, in the FID features (Kynkäänniemi et al., arXiv 1904.06991)

The reference is a data set of real images, anything that training reads, or a named statistics file, .npz with mu [D]
and sigma [D, D]; a file gives no precision and recall. Real images are cropped as for training to the side of the
generated ones. A figure means nothing without its protocol, so the report names the extractor, the reference, its
hash and both counts. Inception weights: torch-fidelity's weights-inception-2015-12-05-6726825d.pth, which it downloads
when no file is given.

Shapes: N images uint8 [N, H, W, 3] or a data set on disk; D features.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, TypeVar
from urllib.error import URLError

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from torch.utils.data import Dataset, Subset
from tqdm import tqdm

from pixelgen_fast.data.crop import centre_crop
from pixelgen_fast.data.encoded import UnreadableImage, decode, inspect
from pixelgen_fast.data.image_index import ImageIndex
from pixelgen_fast.data.index import open_index
from pixelgen_fast.data.storage import read_bytes
from pixelgen_fast.errors import InputError

INCEPTION = "inception-v3-compat"
WEIGHTS_FILE = "weights-inception-2015-12-05-6726825d.pth"
WEIGHTS_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{WEIGHTS_FILE}"

Images = Tensor | str | Path
T = TypeVar("T")

_LEAST = 10


@dataclass(frozen=True)
class FidReport:
    """Figures of generated images against a reference. Precision and recall are None for a statistics file."""

    fid: float
    inception_score: float
    inception_score_std: float
    precision: float | None
    recall: float | None
    generated: str
    generated_count: int
    reference: str
    reference_count: int | None
    extractor: str

    def as_dict(self) -> dict[str, Any]:
        """The report as plain types, for JSON."""
        return asdict(self)

    def lines(self) -> list[str]:
        """The report in words, one line each."""
        figures = f"FID {self.fid:.4g}   IS {self.inception_score:.4g} +- {self.inception_score_std:.2g}"
        if self.precision is not None:
            figures += f"   precision {self.precision:.3f}   recall {self.recall:.3f}"
        count = "an unstated number of" if self.reference_count is None else self.reference_count
        return [
            figures,
            f"    generated  {self.generated_count} images, {self.generated}",
            f"    reference  {count} images, {self.reference}",
            f"    extractor  {self.extractor}; figures of another evaluation suite differ by up to 0.1 FID",
        ]


def _metrics(
    generated: Tensor, logits: Tensor, real: Tensor | None, statistics: Mapping[str, Any] | None
) -> dict[str, float | None]:
    """What FidReport holds of the features; precision and recall need those of the real images."""
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric
    from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

    score = isc_features_to_metric(logits)
    precision = recall = None
    if real is not None:
        statistics = _statistics(real)
        manifold = prc_features_to_metric(generated, real, save_cpu_ram=True, verbose=False)
        precision, recall = manifold[KEY_METRIC_PRECISION], manifold[KEY_METRIC_RECALL]
    return {
        "fid": fid_statistics_to_metric(_statistics(generated), statistics, verbose=False)[KEY_METRIC_FID],
        "inception_score": score[KEY_METRIC_ISC_MEAN],
        "inception_score_std": score[KEY_METRIC_ISC_STD],
        "precision": precision,
        "recall": recall,
    }


def evaluate_fid(
    images: Images,
    reference: Images,
    *,
    weights: str | Path | None = None,
    extractor: str = INCEPTION,
    device: torch.device | str = "cpu",
    batch: int = 64,
    progress: bool = False,
) -> FidReport:
    """Compare generated images with real ones, or with a statistics file of real ones.

    images: uint8 [N, H, W, 3], or a data set of images of one size. reference: the same, or a .npz file; one on disk is
    cropped to H pixels where H = W is known.
    weights: a local file of Inception weights; None lets torch-fidelity use its cache or download them.
    extractor: a name in torch-fidelity's registry of feature extractors.
    Raises ImportError without torch-fidelity, FileNotFoundError for a missing file or folder, ValueError for a file or
    images that cannot be used, naming what cannot be read, ConnectionError if the weights cannot be downloaded.
    """
    fidelity = _torch_fidelity()
    statistics = _read_statistics(reference) if _is_statistics(reference) else None
    datasets = [_as_dataset(images)]
    if statistics is None:
        datasets.append(_as_dataset(reference, _side(images)))
    layers = _layers(extractor, ("fid", "isc"))
    network = _build(extractor, layers, weights, device)
    if statistics is not None:
        width = _extract(network, Subset(datasets[0], [0]), device, 1, False)[layers[0]].shape[1]
        _check_width(reference, len(statistics["mu"]), width, f"{extractor} layer {layers[0]}")
    features = [_extract(network, dataset, device, batch, progress) for dataset in datasets]
    generated, logits = (features[0][layer] for layer in layers)
    real = features[1][layers[0]] if statistics is None else None
    return FidReport(
        **_metrics(generated, logits, real, statistics),
        generated=_describe(images),
        generated_count=len(generated),
        reference=_describe(reference, datasets[-1]),
        reference_count=None if real is None else len(real),
        extractor=f"torch-fidelity {fidelity.__version__} {extractor}",
    )


def check_reference(
    reference: Images, *, size: int | None = None, weights: str | Path | None = None, extractor: str = INCEPTION
) -> None:
    """Raise what evaluate_fid would raise about its reference and weights: to be called before images are drawn.

    size: the side of the images that will be drawn; None takes the reference as it is. All files of a reference are
    read, but not decoded.
    """
    _torch_fidelity()
    if _is_statistics(reference):
        _read_statistics(reference)
    else:
        dataset = _as_dataset(reference, size)
        with ThreadPoolExecutor(8) as pool:
            _check_sizes(pool.map(dataset.shape, range(len(dataset))))
    _build(extractor, _layers(extractor, ("fid", "isc")), weights, "cpu")


def write_statistics(
    images: Images,
    path: str | Path,
    *,
    weights: str | Path | None = None,
    extractor: str = INCEPTION,
    device: torch.device | str = "cpu",
    batch: int = 64,
    progress: bool = False,
) -> Path:
    """Write the statistics file of real images, mu [D] and sigma [D, D] in float64, for evaluate_fid. See there."""
    _torch_fidelity()
    path = Path(path)
    if path.suffix != ".npz":
        raise InputError(f"a statistics file is named .npz, got {path}")
    dataset, layers = _as_dataset(images), _layers(extractor, ("fid",))
    features = _extract(_build(extractor, layers, weights, device), dataset, device, batch, progress)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **_statistics(features[layers[0]]))
    return path


class _TensorImages(Dataset[Tensor]):
    """Images in memory, as torch-fidelity takes them: uint8 [3, H, W] each."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return rearrange(self.images[index], "h w c -> c h w")

    def shape(self, index: int) -> tuple[int, int]:
        """(height, width) of an image."""
        return tuple(self.images.shape[1:3])


class _IndexImages(Dataset[Tensor]):
    """The same of a data set on disk, cropped as for training to size x size; None: as they are.

    Raises InputError, naming the image, for one that cannot be read.
    """

    def __init__(self, index: ImageIndex, size: int | None) -> None:
        self.index, self.size = index, size

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, index: int) -> Tensor:
        image = self._named(index, decode)
        pixels = np.array(image if self.size is None else centre_crop(image, self.size))
        return rearrange(torch.from_numpy(pixels), "h w c -> c h w")

    def shape(self, index: int) -> tuple[int, int]:
        """(height, width) that an image will have, by its header."""
        header = self._named(index, inspect)
        return (header.height, header.width) if self.size is None else (self.size, self.size)

    def _named(self, index: int, what: Callable[[bytes], T]) -> T:
        try:
            return what(read_bytes(self.index, index))
        except UnreadableImage as error:
            raise InputError(f"{self.index.path(index)} of {self.index.root}: {error}") from error


def _torch_fidelity() -> Any:
    try:
        import torch_fidelity
    except ImportError as error:
        raise ImportError("FID is computed with torch-fidelity: pip install 'pixelgen_fast[eval]'") from error
    return torch_fidelity


def _as_dataset(source: Images, size: int | None = None) -> _TensorImages | _IndexImages:
    if isinstance(source, Tensor):
        if source.dtype != torch.uint8 or source.ndim != 4 or source.shape[-1] != 3:
            raise InputError(f"images must be uint8 [N, H, W, 3], got {source.dtype} {list(source.shape)}")
        dataset: _TensorImages | _IndexImages = _TensorImages(source.cpu())
    else:
        if not Path(source).expanduser().exists():
            raise FileNotFoundError(f"{source} is not a folder of images (a statistics file must be named .npz)")
        dataset = _IndexImages(open_index(source), size)
    if len(dataset) < _LEAST:
        found = f"{len(dataset)} {'images' if isinstance(source, Tensor) else 'in ' + str(source)}"
        raise InputError(f"at least {_LEAST} images are needed (the Inception Score has ten splits), found {found}")
    return dataset


def _check_width(file: Images, held: int, given: int, layer: str) -> None:
    if held != given:
        raise InputError(f"{file} holds {held} features, {layer} has {given}; use the statistics of this extractor")


def _is_statistics(source: Images) -> bool:
    return not isinstance(source, Tensor) and Path(source).suffix == ".npz"


def _read_statistics(path: str | Path) -> dict[str, np.ndarray]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"statistics file {path} does not exist; write_statistics makes one from a folder")
    with np.load(path, allow_pickle=False) as file:
        missing = {"mu", "sigma"} - set(file.files)
        if missing:
            raise InputError(f"{path} holds {sorted(file.files)}; a statistics file needs mu and sigma")
        mu, sigma = (np.asarray(file[key], dtype=np.float64) for key in ("mu", "sigma"))
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
        raise InputError(f"{path}: mu must be [D] and sigma [D, D], got {list(mu.shape)} and {list(sigma.shape)}")
    return {"mu": mu, "sigma": sigma}


def _layers(extractor: str, metrics: Sequence[str]) -> list[str]:
    from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY as known

    if extractor not in known:
        raise InputError(f"feature extractor {extractor!r} is unknown; torch-fidelity has {', '.join(sorted(known))}")
    return [known[extractor].get_default_feature_layer_for_metric(metric) for metric in metrics]


def _build(
    extractor: str, layers: Sequence[str], weights: str | Path | None, device: torch.device | str
) -> torch.nn.Module:
    from torch_fidelity.utils import create_feature_extractor

    arguments: dict[str, Any] = {"verbose": False}
    if weights is not None:
        if not Path(weights).is_file():
            raise FileNotFoundError(f"Inception weights {weights} do not exist; get them from {WEIGHTS_URL}")
        try:
            # torch-fidelity unpickles whatever the file holds; reading it as plain tensors first refuses code.
            torch.load(weights, map_location="cpu", weights_only=True)
        except (UnpicklingError, RuntimeError, EOFError) as error:
            raise InputError(f"{weights} is not a file of tensors: {error}") from error
        arguments["feature_extractor_weights_path"] = str(weights)
    try:
        return create_feature_extractor(extractor, list(dict.fromkeys(layers)), cuda=False, **arguments).to(device)
    except (URLError, TimeoutError, ConnectionError) as error:
        fix = f"fetch {WEIGHTS_URL} elsewhere and name the file with weights=..."
        raise ConnectionError(f"torch-fidelity cannot download the weights of {extractor} ({error}); {fix}") from error
    except (RuntimeError, AttributeError, TypeError) as error:
        if weights is None:
            raise
        raise InputError(f"{weights} does not hold the weights of {extractor} ({WEIGHTS_FILE}): {error}") from error


@torch.no_grad()
def _extract(
    network: Any, dataset: Dataset[Tensor], device: torch.device | str, batch: int, progress: bool
) -> dict[str, Tensor]:
    parts: dict[str, list[Tensor]] = {}
    # Threads are enough to decode files, and unlike worker processes they cannot outlive an error.
    with ThreadPoolExecutor(8) as pool, tqdm(total=len(dataset), desc="features", disable=not progress) as bar:
        for numbers in torch.arange(len(dataset)).split(batch):
            images = _stack(list(pool.map(dataset.__getitem__, numbers.tolist())))
            for layer, values in network.convert_features_tuple_to_dict(network(images.to(device))).items():
                parts.setdefault(layer, []).append(values.cpu())
            bar.update(len(images))
    return {layer: torch.cat(values) for layer, values in parts.items()}


def _stack(images: list[Tensor]) -> Tensor:
    _check_sizes(tuple(image.shape[1:]) for image in images)
    return torch.stack(images)


def _check_sizes(shapes: Iterable[tuple[int, int]]) -> None:
    sizes = sorted(f"{height}x{width}" for height, width in set(shapes))
    if len(sizes) > 1:
        raise InputError(f"images must have one size, found {', '.join(sizes[:5])}; crop them as for training first")


def _side(images: Images) -> int | None:
    """The side of square images in memory."""
    square = isinstance(images, Tensor) and images.ndim == 4 and images.shape[1] == images.shape[2]
    return int(images.shape[1]) if square else None


def _statistics(features: Tensor) -> dict[str, np.ndarray]:
    from torch_fidelity.metric_fid import fid_features_to_statistics

    return fid_features_to_statistics(features.double())


def _describe(source: Images, dataset: _TensorImages | _IndexImages | None = None) -> str:
    if isinstance(source, Tensor):
        return "held in memory"
    path = Path(source).expanduser()
    if path.suffix != ".npz":
        cropped = isinstance(dataset, _IndexImages) and dataset.size not in (None, dataset.index.size)
        return f"{path.name}, cropped as for training to {dataset.size} pixels" if cropped else path.name
    with path.open("rb") as file:
        return f"{path.name}, sha256 {hashlib.file_digest(file, 'sha256').hexdigest()[:16]}"
