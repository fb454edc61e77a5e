"""A run's training step under test: what the trainer does with a micro-batch that is on the device already.

    training = Training(config, "cuda", body="triton")
    training.step()                      noising, forward, loss, backward, clipping, AdamW, averages

Weights that a fresh model has at zero are random here: a modulation of zero would hide a kernel that is wrong. Where
DeepSpeed is not installed a plain engine stands for it, and `training.engine_name` says so: float32 master weights
beside bf16 ones, one optimizer step over the masters, one copy back, which is ZeRO 1 on one rank without its buckets.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pixelgen_kernels.bodies import Body, forced
from torch import Tensor, nn

from pixelgen_fast import config as cfg
from pixelgen_fast import models
from pixelgen_fast.data import Batch
from pixelgen_fast.engine.graph import capture, check_graph
from pixelgen_fast.engine.metrics import forward_flops
from pixelgen_fast.engine.objective import FlowMatching
from pixelgen_fast.engine.optimizer import AdamWEMA, Place
from pixelgen_fast.engine.parallel import wrap_blocks
from pixelgen_fast.engine.run_optimizer import run_optimizer
from pixelgen_fast.engine.step import training_step

try:
    from pixelgen_fast.engine import zero
except ModuleNotFoundError as missing:
    if missing.name != "deepspeed":
        raise
    zero = None

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


def load_config(name: str, images: int, *overrides: str) -> cfg.Config:
    """A configuration of configs/ by its name, for steps of one micro-batch of so many images."""
    batch = (f"train.global_batch={images}", f"train.micro_batch={images}")
    return cfg.load(CONFIGS / f"{name}.yaml", [*batch, *overrides], models.model_schema)


class Training:
    """A model of a configuration with one body of the operators, on random images. device: "cuda" (bf16) or "cpu"."""

    def __init__(self, config: cfg.Config, device: str, body: Body) -> None:
        self.config, self.device, self.body = config, torch.device(device), body
        classes, size, batch = config.data.num_classes, config.data.image_size, config.train.micro_batch
        precision = "bf16" if device == "cuda" else "fp32"
        with forced(body):
            with self.device:
                model = models.build_model(config, classes)
            self.fill_zeros(model)
            with forced("reference"), torch.device("meta"):
                self.flops = 3 * batch * forward_flops(models.build_model(config, classes))
            wrap_blocks(model.blocks(), recompute=config.train.recompute, compile_blocks=config.train.compile_blocks)
            self.module = FlowMatching(model, config.objective, config.run.seed, classes)
            check_graph(config, self.device, 1, 1, self.module)
            optimizer = run_optimizer(config.optimizer, model, None)
            if zero is None:
                self.engine_name, self.engine = "plain", PlainEngine(self.module, optimizer, precision)
            else:
                zero.init_distributed(device)
                self.engine_name = "deepspeed"
                self.engine = zero.ZeroEngine(
                    self.module, optimizer, stage=config.train.zero_stage, micro_batch=batch, dtype=precision
                )
            if config.train.cuda_graph:
                capture(self.module, batch, size, self.device)
        random_numbers = torch.Generator(self.device).manual_seed(1)
        self.images = torch.randint(
            0, 256, (batch, size, size, 3), dtype=torch.uint8, device=self.device, generator=random_numbers
        )
        self.labels = torch.arange(batch, device=self.device) % classes
        self.numbers = torch.arange(batch, device=self.device)
        self.loss: Tensor | None = None

    @staticmethod
    @torch.no_grad()
    def fill_zeros(model: nn.Module) -> None:
        """Make every parameter that is all zero random, the same on every call."""
        for number, p in enumerate(model.parameters()):
            if not p.any():
                p.normal_(std=0.02, generator=torch.Generator(p.device).manual_seed(number))

    def step(self) -> None:
        with forced(self.body):
            batch = Batch(self.images, self.labels, self.numbers)
            finite, loss, *_ = training_step(self.engine, self.module, [batch], [0])
            self.loss = torch.where(finite > 0, loss, torch.nan)

    @contextmanager
    def gradient_norms(self) -> Iterator[dict[str, Tensor]]:
        """The norm of each parameter's gradient in the steps inside, by name, 0-dim on the device."""
        norms: dict[str, Tensor] = {}

        def watch(name: str, p: nn.Parameter) -> Any:
            return p.register_hook(lambda gradient: norms.__setitem__(name, gradient.detach().float().norm()))

        handles = [watch(name, p) for name, p in self.module.named_parameters() if p.requires_grad]
        try:
            yield norms
        finally:
            for handle in handles:
                handle.remove()


class PlainEngine:
    """A module and an AdamWEMA over its parameters, on one rank without DeepSpeed. precision: "bf16" or "fp32"."""

    def __init__(self, module: nn.Module, optimizer: AdamWEMA, precision: str) -> None:
        self.module, self.optimizer = module, optimizer
        self.masters: list[tuple[nn.Parameter, nn.Parameter]] = []
        if precision == "bf16":
            for group in optimizer.param_groups:
                masters = [nn.Parameter(p.detach().clone()) for p in group["params"]]
                self.masters += zip(group["params"], masters, strict=True)
                group["params"] = masters
            optimizer.locate({weight: Place(master, 0, 0, master.numel()) for weight, master in self.masters})
            module.bfloat16()

    @property
    def grad_norm(self) -> Tensor | float:
        """Global gradient norm before clipping of the last step."""
        return self.optimizer.norm

    def __call__(self, *arguments: Any) -> Tensor:
        return self.module(*arguments)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    @torch.no_grad()
    def step(self) -> None:
        for weight, master in self.masters:
            master.grad, weight.grad = weight.grad.float(), None
        self.optimizer.step()
        if self.masters:
            weights, masters = zip(*self.masters, strict=True)
            torch._foreach_copy_(weights, masters)
        self.optimizer.zero_grad()
