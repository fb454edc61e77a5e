"""What a training step would be without this package: the same model in plain PyTorch, as a script would write it.

    eager       the operators' definitions in PyTorch, with its attention, fused RMSNorm and fused AdamW
    compiled    the same, whole model and loss under torch.compile

    step = Peer(config, "compiled");  step.step()

Noise, times and labels are those of `Training`, so that losses agree; clipping is torch.nn.utils.clip_grad_norm_, the
averages are torch._foreach_lerp_. No DeepSpeed, no skipping of bad steps.
"""

from __future__ import annotations

import torch
from pixelgen_kernels.bodies import forced
from torch import Tensor
from training import Training

from pixelgen_fast import config as cfg
from pixelgen_fast import models
from pixelgen_fast.engine.objective import FlowMatching

PEERS = ("eager", "compiled")


class Peer:
    """A model of a configuration on a CPU, on the random images of `Training`. Raises ValueError for another peer."""

    body = "reference"

    def __init__(self, config: cfg.Config, peer: str) -> None:
        if peer not in PEERS:
            raise ValueError(f"no such peer: {peer!r}; there are {', '.join(PEERS)}")
        classes, size, batch = config.data.num_classes, config.data.image_size, config.train.micro_batch
        with forced(self.body):
            model = models.build_model(config, classes)
            Training.fill_zeros(model)
            self.module = FlowMatching(model, config.objective, config.run.seed, classes)
            if peer == "compiled":  # noising, model and loss; without the notes that `forward` makes of its parts
                self.module.losses = torch.compile(self.module.losses, dynamic=False)
        o = config.optimizer
        self.weights = [p for p in model.parameters() if p.requires_grad]
        self.averages = [[p.detach().clone() for p in self.weights] for _ in o.ema]
        self.decays, self.clip = o.ema, o.clip
        self.optimizer = torch.optim.AdamW(
            self.weights, lr=o.lr, betas=tuple(o.betas), eps=o.eps, weight_decay=o.weight_decay, fused=True
        )
        numbers = torch.Generator().manual_seed(1)
        self.images = torch.randint(0, 256, (batch, size, size, 3), dtype=torch.uint8, generator=numbers)
        self.labels, self.numbers = torch.arange(batch) % classes, torch.arange(batch)
        self.loss: Tensor | None = None

    def step(self) -> None:
        with forced(self.body):
            self.module.begin(0)
            self.loss = self.module(self.images, self.labels, self.numbers)
            self.loss.backward()
            if self.clip is not None:
                torch.nn.utils.clip_grad_norm_(self.weights, self.clip)
            self.optimizer.step()
            self.optimizer.zero_grad()
            with torch.no_grad():
                for average, decay in zip(self.averages, self.decays, strict=True):
                    torch._foreach_lerp_(average, self.weights, 1.0 - decay)
