"""The networks whose features images are judged by, and what they see of an image.

    pool      2048 pooled features of Inception v3, as FID has them
    logits    its 1008 class logits without bias, for the Inception Score
    spatial   the first 7 channels of its block mixed_6 at 17 x 17 places, 2023 numbers, as ADM's evaluator takes them
              for sFID (Nash et al., arXiv 2103.03841; Dhariwal and Nichol, arXiv 2105.05233)
    dino      1024 numbers, the class token after the last norm of DINOv2 ViT-L/14, for FD-DINOv2 (Stein et al.,
              arXiv 2306.04675)

Inception is torch-fidelity's port of the TensorFlow graph, which resizes to 299 pixels by itself. DINOv2 is timm's:
images are resized to 16 x 16 patches (224 pixels) bicubically with antialiasing, then normalised, and its table of
positions is resized as Meta's code does: bicubic without antialiasing, at the scale (16 + 0.1) / 37.

Shapes: N images uint8 [N, H, W, 3].
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from urllib.error import URLError

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from pixelgen_fast.dino.network import load_dino
from pixelgen_fast.errors import InputError

INCEPTION = "inception-v3-compat"
WEIGHTS_FILE = "weights-inception-2015-12-05-6726825d.pth"
WEIGHTS_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{WEIGHTS_FILE}"
DINO = "vit_large_patch14_dinov2.lvd142m"

POOL, LOGITS, SPATIAL, DINO_TOKEN = "pool", "logits", "spatial", "dino"
_SPATIAL_BLOCK, _SPATIAL_CHANNELS = "Mixed_6d", 7  # of the port; the graph counts its blocks from mixed, 35 x 35
_DINO_GRID, _OFFSET = 16, 0.1


class FeatureNetworks:
    """images uint8 [N, H, W, 3] -> {name: float32 [N, D] on the CPU}; see above.

    extractor: a name in torch-fidelity's registry of feature extractors; one without Inception's blocks gives no
    spatial features. weights: its file; None lets torch-fidelity use its cache or download them. dino: a file of
    DINOv2 ViT-L/14 in timm's, Meta's or Hugging Face's names, or a folder that holds a teacher; None for no such
    features. about: what they are, for reports, with the SHA-256 of each file.
    Raises ImportError without torch-fidelity or timm, FileNotFoundError for a missing file, InputError for one that
    cannot be used, ConnectionError if the weights cannot be downloaded.
    """

    def __init__(
        self,
        extractor: str = INCEPTION,
        weights: str | Path | None = None,
        dino: str | Path | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        version = torch_fidelity().__version__
        self.device = torch.device(device)
        self.layers = dict(zip((POOL, LOGITS), layers_of(extractor, ("fid", "isc")), strict=True))
        self.inception = _build(extractor, [*dict.fromkeys(self.layers.values())], weights, device)
        self.dino = None if dino is None else Dino(*_open_dino(dino)).to(device)
        self.extractor = extractor
        self.about: dict[str, Any] = {
            "extractor": f"torch-fidelity {version} {extractor}",
            "inception_sha256": None if weights is None else _sha256(Path(weights)),
            "dino_sha256": None if dino is None else _sha256(_dino_file(Path(dino))),
        }
        self._spatial: Tensor | None = None
        if (block := dict(self.inception.named_children()).get(_SPATIAL_BLOCK)) is not None:
            block.register_forward_hook(self._keep)

    def _keep(self, block: nn.Module, given: Any, output: Tensor) -> None:
        self._spatial = rearrange(output[:, :_SPATIAL_CHANNELS], "n c h w -> n (h w c)")

    @torch.no_grad()
    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        x = rearrange(images.to(self.device), "n h w c -> n c h w").contiguous()
        found = self.inception.convert_features_tuple_to_dict(self.inception(x))
        features = {name: found[layer] for name, layer in self.layers.items()}
        if self._spatial is not None:
            features[SPATIAL] = self._spatial
        if self.dino is not None:
            features[DINO_TOKEN] = self.dino(x)
        return {name: values.float().cpu() for name, values in features.items()}


class Dino(nn.Module):
    """A DINOv2: images uint8 [N, 3, H, W] -> its class token after the last norm, float32 [N, D].

    network: of timm, with a table of positions, which is resized here. Raises InputError for one without.
    """

    def __init__(self, network: nn.Module, origin: str) -> None:
        super().__init__()
        if getattr(network, "pos_embed", None) is None:
            raise InputError(f"{origin} holds no DINOv2: it has no table of positions, as DINOv3 has none")
        before, table = network.patch_embed.grid_size[0], network.pos_embed.detach().clone()
        self.side = _DINO_GRID * network.patch_embed.patch_size[0]
        network.set_input_size(img_size=(self.side, self.side))
        if before != _DINO_GRID:
            network.pos_embed.data = resized_positions(table, before)
        self.network = network.requires_grad_(False).eval()
        for name in ("mean", "std"):
            values = torch.tensor(network.pretrained_cfg[name])[:, None, None]
            self.register_buffer(name, 255 * values, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        x = F.interpolate(images.float(), size=(self.side, self.side), mode="bicubic", antialias=True)
        return self.network.forward_features((x - self.mean) / self.std)[:, 0]


def resized_positions(table: Tensor, before: int) -> Tensor:
    """A table of positions [1, before^2 + more, D] for 16 x 16 patches; what comes before the patches' stays."""
    prefix = table.shape[1] - before**2
    grid = rearrange(table[:, prefix:], "b (h w) d -> b d h w", h=before)
    grid = F.interpolate(grid, scale_factor=[(_DINO_GRID + _OFFSET) / before] * 2, mode="bicubic", antialias=False)
    return torch.cat([table[:, :prefix], rearrange(grid, "b d h w -> b (h w) d")], dim=1)


def torch_fidelity() -> Any:
    try:
        import torch_fidelity
    except ImportError as error:
        raise ImportError("FID is computed with torch-fidelity: pip install 'pixelgen_fast[eval]'") from error
    return torch_fidelity


def layers_of(extractor: str, metrics: tuple[str, ...]) -> list[str]:
    """The extractor's layer for each metric of torch-fidelity. Raises InputError for one that is not registered."""
    from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY as known

    if extractor not in known:
        raise InputError(f"feature extractor {extractor!r} is unknown; torch-fidelity has {', '.join(sorted(known))}")
    return [known[extractor].get_default_feature_layer_for_metric(metric) for metric in metrics]


def _build(extractor: str, layers: list[str], weights: str | Path | None, device: torch.device | str) -> nn.Module:
    from torch_fidelity.utils import create_feature_extractor

    arguments: dict[str, Any] = {"verbose": False}
    if weights is not None:
        if not Path(weights).is_file():
            raise FileNotFoundError(f"Inception weights {weights} do not exist; get them from {WEIGHTS_URL}")
        try:
            # torch-fidelity unpickles whatever the file holds; reading it as plain tensors first refuses code.
            torch.load(weights, map_location="cpu", weights_only=True)
        except UnpicklingError as error:  # whose text advises to run what the file holds
            raise InputError(f"{weights} is not a file of tensors; get {WEIGHTS_FILE} from {WEIGHTS_URL}") from error
        except (RuntimeError, EOFError) as error:
            raise InputError(f"{weights} is not a file of tensors: {error}") from error
        arguments["feature_extractor_weights_path"] = str(weights)
    try:
        return create_feature_extractor(extractor, layers, cuda=False, **arguments).to(device)
    except (URLError, TimeoutError, ConnectionError) as error:
        fix = f"fetch {WEIGHTS_URL} elsewhere and name the file with weights=..."
        raise ConnectionError(f"torch-fidelity cannot download the weights of {extractor} ({error}); {fix}") from error
    except (RuntimeError, AttributeError, TypeError) as error:
        if weights is None:
            raise
        raise InputError(f"{weights} does not hold the weights of {extractor} ({WEIGHTS_FILE}): {error}") from error


def _open_dino(path: str | Path) -> tuple[nn.Module, str]:
    """The network of a file, or of a teacher's folder, which names its architecture itself; and where it is from."""
    about, name = Path(path) / "config.json", DINO
    if about.is_file():
        try:
            name = str(json.loads(about.read_text())["architecture"])
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"--dino {path}: {about} is not that of a teacher: {error}") from error
    return load_dino(name, str(path), ("--dino", "--dino")), f"--dino {path}"


def _dino_file(path: Path) -> Path:
    return path / "model.safetensors" if path.is_dir() else path


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
