"""Feature networks for tests: torch-fidelity's Inception with random weights, as a file, since the published ones
cannot be had where tests run; and one that pools pixels, for what does not depend on the features."""

from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn
from torch_fidelity import feature_extractor_inceptionv3 as inception
from torch_fidelity import register_feature_extractor
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

from pixelgen_fast.eval.features import INCEPTION


def network(layers: list[str]) -> nn.Module:
    """The network with weights of its own, which are random: none is read or downloaded."""
    of_class = inception.FeatureExtractorInceptionV3
    with (
        mock.patch.object(inception, "load_state_dict_from_url", lambda *_, **__: {}),
        mock.patch.object(of_class, "load_state_dict", lambda self, state: None),
    ):
        made = of_class(INCEPTION, layers)
    torch.manual_seed(0)
    for name, weight in made.named_parameters():
        if weight.ndim == 4:
            nn.init.kaiming_normal_(weight, nonlinearity="relu")  # features of about one, not of 1e-7
        elif name == "fc.weight":
            nn.init.normal_(weight, std=0.1)
    return made


def write_inception(folder: Path) -> Path:
    """Write the file; the same each time."""
    path = folder / "inception.pth"
    torch.save(network(["2048"]).state_dict(), path)
    return path


POOLED = "pooled-pixels"


class PooledPixels(FeatureExtractorBase):
    """Features "pool": 2x2 mean intensities, 12 numbers; "logits": the same, scaled."""

    def __init__(self, name, features_list, **kwargs):
        super().__init__(name, features_list)

    @staticmethod
    def get_provided_features_list():
        return ("pool", "logits")

    @staticmethod
    def get_default_feature_layer_for_metric(metric):
        return "logits" if metric == "isc" else "pool"

    def forward(self, x):
        assert x.dtype == torch.uint8
        pool = F.adaptive_avg_pool2d(x.float(), 2).flatten(1)
        return tuple({"pool": pool, "logits": pool / 20}[layer] for layer in self.features_list)


def register_pooled() -> None:
    """Make the small extractor one of torch-fidelity's, for this process."""
    if POOLED not in FEATURE_EXTRACTORS_REGISTRY:
        register_feature_extractor(POOLED, PooledPixels)
