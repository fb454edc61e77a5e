"""LPIPS (arXiv 1801.03924) of VGG-16, computed by the package of its authors, `lpips`.

Its weights on VGG's channels come with the package, VGG's own from torchvision's hub or file.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from pixelgen_fast.errors import InputError
from pixelgen_fast.weights import misfits, read_file

RANDOM = "random"
NO_LPIPS = "none"  # where LPIPS is not asked for
_FILE = "https://download.pytorch.org/models/vgg16-397923af.pth"
_FEATURES = re.compile(r"^features\.")


class Perceptual(nn.Module):
    """forward(a, b [B, 3, S, S] in [-1, 1]) -> float32 [B], differentiable; S at least 16. Frozen.

    vgg: a file of torchvision's VGG-16, "random" for a fixed random one, None for the hub's. key: the setting that
    holds it, for messages. Raises ImportError without lpips, InputError for weights that cannot be had.
    """

    def __init__(self, vgg: str | None, key: str = "objective.vgg") -> None:
        super().__init__()
        try:
            import lpips
        except ImportError as error:
            raise ImportError(
                f"LPIPS needs the package lpips: pip install pixelgen_fast[decoder], or set {key.split('.')[0]}"
                ".perceptual_weight=0"
            ) from error
        given = None if vgg in (None, RANDOM) else _read(Path(vgg), key)
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of how lpips asks torchvision for a network
            torch.manual_seed(0)
            try:
                self.network = lpips.LPIPS(net="vgg", pnet_rand=vgg is not None, verbose=False)
            except OSError as error:
                raise InputError(
                    f"{key} is null, and VGG-16 could not be fetched ({error}); download {_FILE} and name the file"
                ) from error
        if given is not None:
            _fill(self.network.net, given, vgg)
        self.requires_grad_(False).eval()

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.network(a, b).flatten().float()

    def train(self, mode: bool = True) -> Perceptual:
        """Stays in evaluation mode, whatever is asked."""
        return super().train(False)


def _read(path: Path, key: str) -> dict[str, Tensor]:
    """The convolutions of torchvision's VGG-16, by the number of their layer."""
    if not path.is_file():
        raise InputError(f"{key} {path}: no such file; give VGG-16 of torchvision, {RANDOM!r}, or null for the hub")
    return {_FEATURES.sub("", name): v for name, v in read_file(path).items() if _FEATURES.match(str(name))}


def _fill(network: nn.Module, given: dict[str, Tensor], origin: str) -> None:
    """Copy them into lpips' network, whose five slices number the layers as torchvision does."""
    own = {name.split(".", 1)[1]: name for name in network.state_dict()}
    if wrong := misfits(given, {short: network.state_dict()[name] for short, name in own.items()}):
        raise InputError(f"{origin}: is no VGG-16 of torchvision: {'; '.join(wrong[:5])}")
    network.load_state_dict({own[short]: value for short, value in given.items()})
