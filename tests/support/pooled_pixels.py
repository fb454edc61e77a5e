"""A feature extractor for torch-fidelity that needs no weights, for tests of what is done with features."""

import pytest
import torch
import torch.nn.functional as F
from torch_fidelity import register_feature_extractor
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

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


@pytest.fixture(scope="module")
def registered() -> None:
    """Make POOLED a name that torch-fidelity knows."""
    if POOLED not in FEATURE_EXTRACTORS_REGISTRY:
        register_feature_extractor(POOLED, PooledPixels)
