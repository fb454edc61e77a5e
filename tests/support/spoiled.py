"""Losses that go wrong at chosen images."""

import pytest
import torch

from pixelgen_fast.engine.objective import FlowMatching


class Spoiled:
    """FlowMatching.forward whose loss is multiplied for a range of image numbers, the first `times` that they come."""

    def __init__(self, first: int, last: int, factor: float = torch.inf, times: float = torch.inf) -> None:
        self.first, self.last, self.factor, self.times = first, last, factor, times
        self.original = FlowMatching.forward

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def forward(
            module: FlowMatching, images: torch.Tensor, labels: torch.Tensor, numbers: torch.Tensor
        ) -> torch.Tensor:
            loss = self.original(module, images, labels, numbers)
            bad = self.times > 0 and bool(((numbers >= self.first) & (numbers < self.last)).any())
            self.times -= bad
            return loss * (self.factor if bad else 1.0)

        monkeypatch.setattr(FlowMatching, "forward", forward)
