"""The decoder and its discriminator, each with an AdamW of its own, as one engine that checkpoints know.

Every rank holds all of both in float32; gradients are averaged over the ranks. Names are `decoder.<parameter>` and
`discriminator.<parameter>`; the discriminator has no averages.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pixelgen_fast.decoding.schema import Optimizer
from pixelgen_fast.engine import group
from pixelgen_fast.engine.optimizer import COUNTERS, SKIPPED, SKIPPED_IN_A_ROW, AdamWEMA
from pixelgen_fast.runs.shards import MASTER

DECODER, DISCRIMINATOR = "decoder", "discriminator"
RAW = "raw"


class PairEngine:
    """What `runs.checkpoint` saves and restores, and what takes the steps of both sides.

    decoder, discriminator: on the device, their parameters the same on every rank; None for no discriminator.
    """

    stage = 0

    def __init__(self, decoder: nn.Module, discriminator: nn.Module | None, settings: Optimizer) -> None:
        together = dist.is_available() and dist.is_initialized()
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)
        self.host_group = group.host_group() if together else None
        self.sides = {DECODER: decoder} | ({} if discriminator is None else {DISCRIMINATOR: discriminator})
        self.optimizers = {
            side: AdamWEMA(
                module.parameters(),
                lr=settings.lr,
                betas=settings.betas,
                eps=settings.eps,
                weight_decay=settings.weight_decay,
                ema_decays=settings.ema if side == DECODER else (),
                clip_norm=settings.clip,
            )
            for side, module in self.sides.items()
        }
        for optimizer in self.optimizers.values():
            for parameter in optimizer.param_groups[0]["params"]:
                optimizer.init_state(parameter, optimizer.param_groups[0])
        self._parameters = {
            f"{s}.{name}": p for s, module in self.sides.items() for name, p in module.named_parameters()
        }
        self.shapes = {name: tuple(p.shape) for name, p in self._parameters.items()}

    def update(self, side: str, lr: float) -> None:
        """Average the gradients of a side over the ranks, take its step at this rate, and forget them."""
        optimizer = self.optimizers[side]
        self.average([p.grad for p in optimizer.param_groups[0]["params"] if p.grad is not None])
        optimizer.set_lr(lr)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def average(self, tensors: list[Tensor]) -> None:
        """Replace tensors by their means over the ranks, in place."""
        if self.world == 1:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        flat /= self.world
        for tensor, mean in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(mean.view_as(tensor))

    @property
    def grad_norm(self) -> Tensor | float:
        """Of the decoder's last step, before clipping."""
        return self.optimizers[DECODER].norm

    @property
    def skipped(self) -> Tensor:
        """How many steps of either side were skipped for a gradient that is not finite, on the device."""
        return torch.stack([optimizer.counters[SKIPPED] for optimizer in self.optimizers.values()]).sum()

    @property
    def skipped_in_a_row(self) -> Tensor:
        """How many of the last steps were skipped in a row, of the side that skipped more; on the device."""
        return torch.stack([optimizer.counters[SKIPPED_IN_A_ROW] for optimizer in self.optimizers.values()]).max()

    def names(self) -> list[str]:
        return list(self._parameters)

    def kinds(self, name: str) -> list[str]:
        optimizer = self._optimizer(name)
        return [MASTER, "exp_avg", "exp_avg_sq", *optimizer.ema_keys(optimizer.param_groups[0])]

    @torch.no_grad()
    def gather(self, name: str, kinds: list[str] | None = None, to: int | None = None) -> dict[str, Tensor]:
        """CPU copies of what there is of a parameter; to: the only rank that needs them."""
        if to not in (None, self.rank):
            return {}
        own = self._state(name)
        return {kind: own[kind].detach().to("cpu", copy=True) for kind in kinds or self.kinds(name)}

    @torch.no_grad()
    def restore(self, name: str, state: dict[str, Tensor]) -> None:
        own = self._state(name)
        for kind in self.kinds(name):
            own[kind].copy_(state[kind])

    def buffers(self) -> dict[str, Tensor]:
        """The vectors of the discriminator's spectral norms."""
        return {name: buffer.detach().cpu() for name, buffer in self._buffers().items()}

    @torch.no_grad()
    def restore_buffers(self, buffers: dict[str, Tensor]) -> None:
        own = self._buffers()
        for name, value in buffers.items():
            own[name].copy_(value)

    def scalars(self) -> dict[str, int]:
        return {f"{s}_{name}": n for s, optimizer in self.optimizers.items() for name, n in optimizer.scalars().items()}

    def load_scalars(self, scalars: dict[str, int]) -> None:
        for side, optimizer in self.optimizers.items():
            optimizer.load_scalars({name: scalars[f"{side}_{name}"] for name in COUNTERS})

    def state_dict(self, kind: str = RAW, to: int | None = None) -> dict[str, Tensor]:
        """The decoder's weights under its own names, raw or an average, on the CPU."""
        key = MASTER if kind == RAW else kind
        names = [name for name in self.names() if name.startswith(f"{DECODER}.")]
        found = {name.removeprefix(f"{DECODER}."): self.gather(name, [key], to) for name in names}
        return {name: tensors[key] for name, tensors in found.items() if tensors}

    def _optimizer(self, name: str) -> AdamWEMA:
        return self.optimizers[name.split(".", 1)[0]]

    def _state(self, name: str) -> dict[str, Tensor]:
        parameter = self._parameters[name]
        return {MASTER: parameter, **self._optimizer(name).state[parameter]}

    def _buffers(self) -> dict[str, Tensor]:
        return {
            f"{side}.{name}": buffer
            for side, module in self.sides.items()
            for name, buffer in module.named_buffers()
            if name in module.state_dict(keep_vars=True)
        }
