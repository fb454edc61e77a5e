"""The only file that imports DeepSpeed: process group, ZeRO engine, and the full tensors behind the shards.

ZeRO (Rajbhandari et al., SC 2020): stage 1 shards the fp32 master weights, moments and averages over the ranks,
stage 2 also the gradients, stage 3 also the parameters. Whatever the stage, a rank owns one contiguous piece of each
parameter's flattened fp32 state, possibly empty:

    parameter  [ . . . . . . | o o o o o o | . . . . ]      pieces of all ranks together cover it once
                start = 6 ----^  length 6

so `gather` and `restore` need nothing but (start, views of that piece), and a checkpoint knows no stage or world size.
One rank at stage 1 has nothing to shard: DeepSpeed then runs without ZeRO. In fp32 the piece is the parameter itself,
and no gradient or weight is copied in a step; in bf16, with one micro-batch a step, it is a part of `masters`. Clipping
is the optimizer's, at no pass of its own and without a wait.

DeepSpeed chooses its accelerator when it is imported: import this file only when a run needs it.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pixelgen_fast.engine import group, masters
from pixelgen_fast.engine.optimizer import SKIPPED, SKIPPED_IN_A_ROW, AdamWEMA, Place
from pixelgen_fast.engine.zero_options import check, merged, options
from pixelgen_fast.runs.checkpoint import ema_key

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state, set_z3_leaf_module

log = logging.getLogger(__name__)

MASTER = "master"
RAW = "raw"

# An empty table of what can be compiled: on CPU DeepSpeed would probe the compiler and build a shared-memory
# all-reduce when the first engine starts, a minute for a collective that gloo has.
deepspeed.ops.__compatible_ops__ = {}
# DeepSpeed calls collectives by names that torch has begun to rename, many times a step.
warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)


def init_distributed(
    device: torch.device | str, store: dist.Store | None = None, seconds: float = 1800.0
) -> tuple[int, int, int]:
    """Join the run's processes as `group.join` does: (rank, world size, local rank).

    Raises ValueError if DeepSpeed was imported for another device.
    """
    device = torch.device(device)
    if get_accelerator().device_name().split(":")[0] != device.type:
        raise ValueError(
            f"DeepSpeed was imported for {get_accelerator().device_name()!r}, but the run is on {device.type!r}; set "
            f"DS_ACCELERATOR={device.type} in the environment before starting"
        )
    return group.join(device, store, seconds)


@dataclass(frozen=True)
class _Piece:
    """This rank's part of a parameter: where it begins in the flattened parameter, and views of its fp32 state."""

    start: int
    state: dict[str, Tensor]


class ZeroEngine:
    """A module, an AdamWEMA and a ZeRO stage, trained together.

    module: on any device; DeepSpeed moves it, and broadcasts rank 0's parameters (not its buffers).
    optimizer: over the module's trainable parameters; it clips. stage: 1, 2 or 3. micro_batch: images per rank and
    forward. accumulation: micro-batches per step. dtype: of parameters and activations; with "bf16" gradients are
    communicated and accumulated in the two dtypes given (an "fp32" run has both in fp32).
    whole_modules: modules whose parameters stage 3 gathers and frees together, because their code reads parameters of
    children that it does not call. overrides: more DeepSpeed options, merged last.

    Gradients are means over the global batch: give `backward` the mean loss of the micro-batch.
    Raises ValueError for a stage, dtype or size that does not exist.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: AdamWEMA,
        *,
        stage: int,
        micro_batch: int,
        accumulation: int = 1,
        dtype: str = "fp32",
        communication_dtype: str = "fp32",
        accumulation_dtype: str = "fp32",
        whole_modules: Iterable[nn.Module] = (),
        overrides: dict[str, Any] | None = None,
    ) -> None:
        dtypes = (dtype, communication_dtype, accumulation_dtype)
        check(stage, micro_batch, accumulation, dtypes)
        if stage not in optimizer.stages:
            raise ValueError(f"{type(optimizer).__name__} works at ZeRO stages {optimizer.stages}, got {stage}")
        self._parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self._groups = _groups_by_name(self._parameters, optimizer)
        self.shapes = {name: tuple(p.shape) for name, p in self._parameters.items()}
        self.stage, self.optimizer = stage, optimizer
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.host_group = group.host_group()
        numel = sum(p.numel() for p in self._parameters.values())
        keeper = masters.keeper_of_state(dtype, stage, self.world, accumulation)
        self._sharded, own_masters = keeper == "shards", keeper == "masters"
        given = ("fp32",) * 3 if own_masters else dtypes
        config = options(stage if self._sharded else 0, micro_batch, accumulation, self.world, given, numel)

        if stage == 3:
            for whole in whole_modules:
                set_z3_leaf_module(whole, True)
        if dtype == "bf16" and self._sharded:
            # DeepSpeed casts parameters only; the module casts its buffers too, and knows those that keep float32
            module.bfloat16()
        self._engine = _initialize(module, optimizer, merged(config, overrides or {}))
        self._zero = self._engine.optimizer
        if own_masters:
            module.bfloat16()
        self._masters = masters.Masters(optimizer) if own_masters else None
        device = get_accelerator().current_device_name()
        optimizer.counters = optimizer.counters.to(device)
        self._take_norm_from_shards()
        self._norm = torch.zeros((), device=device)
        self._make_state()
        self._pieces = {name: self._piece(name, p) for name, p in self._parameters.items()}
        if self._sharded and stage < 3:
            optimizer.locate({p: self._place(name) for name, p in self._parameters.items()})

    def _take_norm_from_shards(self) -> None:
        if self._sharded:
            self.optimizer.grad_norm = lambda: self._zero._global_grad_norm
        else:
            # DeepSpeed would flatten the gradients, reduce them over one rank and copy them back
            self._engine.enable_backward_allreduce = False

    @property
    def module(self) -> nn.Module:
        """The module given, its parameters now DeepSpeed's: at stage 3 they are empty outside a forward pass."""
        return self._engine.module

    @property
    def grad_norm(self) -> Tensor:
        """Global gradient norm before clipping of the last step, 0-dim, on the device; inf if it was not finite."""
        return self._norm

    @property
    def skipped(self) -> Tensor:
        """How many steps were skipped for a gradient that is not finite: 0-dim int64, on the device."""
        return self.optimizer.counters[SKIPPED]

    @property
    def skipped_in_a_row(self) -> Tensor:
        """How many of the last steps were skipped in a row: 0-dim int64, on the device."""
        return self.optimizer.counters[SKIPPED_IN_A_ROW]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._engine(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a micro-batch's mean loss, divided by the number of micro-batches in a step."""
        self._engine.backward(loss)

    def step(self) -> bool:
        """To be called after each `backward`: updates the weights after the last micro-batch of a step, else nothing.

        Returns whether this was the end of a step. A gradient norm that is not finite makes it a skipped one: in most
        stages DeepSpeed then returns before the optimizer is called, in the others the optimizer skips.
        """
        boundary = self._engine.is_gradient_accumulation_boundary()
        if self._masters:
            self._masters.take_gradients()
        self._engine.step()
        if boundary:
            norm = self._zero._global_grad_norm if self._sharded else self.optimizer.norm
            self._norm = torch.as_tensor(norm, dtype=torch.float32, device=self._norm.device)
            if self._sharded:
                self.optimizer.end_step(self._norm)
        return boundary

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of the next steps."""
        self.optimizer.set_lr(lr)

    def names(self) -> list[str]:
        """Names of the trained parameters, in the module's order, the same on every rank."""
        return list(self._parameters)

    def kinds(self, name: str) -> list[str]:
        """What there is of a parameter: `master`, the optimizer's moments, and `ema_<decay>` for each average."""
        group = self._groups[name]
        return [MASTER, *self.optimizer.moments(group), *self.optimizer.ema_keys(group)]

    @torch.no_grad()
    def gather(self, name: str, kinds: list[str] | None = None, to: int | None = None) -> dict[str, Tensor]:
        """Full fp32 CPU tensors of a parameter, e.g. {"master": ..., "exp_avg": ...}. All ranks must call it.

        kinds: which, all by default. to: the only rank that needs them; the others get an empty dict.
        """
        kinds = kinds or self.kinds(name)
        piece, shape = self._pieces[name], self.shapes[name]
        full = torch.zeros((len(kinds), *shape), device=self._norm.device)
        flat = full.view(len(kinds), -1)
        for row, kind in zip(flat, kinds, strict=True):
            view = piece.state[kind]
            row[piece.start : piece.start + view.numel()] = view
        if self.world > 1 and to is None:
            dist.all_reduce(full)
        elif self.world > 1:
            dist.reduce(full, dst=to)
        return dict(zip(kinds, full.cpu(), strict=True)) if to in (None, self.rank) else {}

    @torch.no_grad()
    def restore(self, name: str, state: dict[str, Tensor]) -> None:
        """Set a parameter from full tensors as `gather` gives them; the module's own copy follows. No communication.

        Every rank must call it with the same tensors. Raises ValueError for a missing kind or another shape.
        """
        piece, shape = self._pieces[name], self.shapes[name]
        for kind in self.kinds(name):
            if kind not in state or tuple(state[kind].shape) != shape:
                found = list(state[kind].shape) if kind in state else f"only {sorted(state)}"
                raise ValueError(f"cannot restore {kind} of {name}: needs shape {list(shape)}, got {found}")
            view = piece.state[kind]
            view.copy_(state[kind].flatten()[piece.start : piece.start + view.numel()])
        self._set_module_parameter(name, state[MASTER])

    def buffers(self) -> dict[str, Tensor]:
        """The module's persistent buffers as CPU tensors, as this rank has them."""
        persistent = self.module.state_dict(keep_vars=True).keys()
        return {name: b.detach().cpu() for name, b in self.module.named_buffers() if name in persistent}

    @torch.no_grad()
    def restore_buffers(self, buffers: dict[str, Tensor]) -> None:
        """Set the module's persistent buffers. Raises ValueError unless the names are the same."""
        own = dict(self.module.named_buffers())
        if buffers.keys() != self.buffers().keys():
            raise ValueError(f"buffers differ: {sorted(buffers.keys() ^ self.buffers().keys())}")
        for name, value in buffers.items():
            own[name].copy_(value)

    def scalars(self) -> dict[str, int]:
        """Steps applied, skipped, skipped in a row. Waits for the device."""
        return self.optimizer.scalars()

    def load_scalars(self, scalars: dict[str, int]) -> None:
        """Set what `scalars` gave."""
        self.optimizer.load_scalars(scalars)

    def weights(self, kind: str = RAW, to: int | None = None) -> Iterator[tuple[str, Tensor]]:
        """Every (name, full CPU tensor) of the module's state dict, gathered one at a time. All ranks must exhaust it.

        kind: "raw" (the fp32 master weights) or a key such as "ema_0.9999"; a parameter that is trained but not
        averaged is given raw. Frozen parameters and persistent buffers come as they are. to: the only rank that gets
        them; the others get nothing. Raises ValueError for an average that is not kept.
        """
        if kind != RAW and kind not in map(ema_key, self.optimizer.ema_decays):
            raise ValueError(f"no weights {kind!r}; there are {[RAW, *map(ema_key, self.optimizer.ema_decays)]}")
        for name in self.names():
            key = kind if kind in self.kinds(name) else MASTER
            for tensor in self.gather(name, [key], to).values():
                yield name, tensor
        frozen = [(name, p) for name, p in self.module.named_parameters() if not p.requires_grad]
        for name, p in frozen:
            with deepspeed.zero.GatheredParameters([p], enabled=self.stage == 3):
                tensor = p.detach().cpu().clone()
            if to in (None, self.rank):
                yield name, tensor
        if to in (None, self.rank):
            yield from self.buffers().items()

    def state_dict(self, kind: str = RAW, to: int | None = None) -> dict[str, Tensor]:
        """`weights` as a dict: full CPU tensors on every rank, or on rank `to` only (empty elsewhere)."""
        return dict(self.weights(kind, to))

    def _make_state(self) -> None:
        """Make the optimizer state now, not in the first step: a checkpoint may be read or written before it."""
        groups = self.optimizer.param_groups
        if self.stage == 3:
            for number, flat in enumerate(self._zero.fp32_partitioned_groups_flat):
                self.optimizer.init_state(flat, groups[self._zero.sub_group_to_group_id[number]])
        else:
            for group in groups:
                for flat in group["params"]:
                    self.optimizer.init_state(flat, group)
            if self._sharded:
                self._zero._lazy_init_hp_params_optimizer_state()

    def _piece(self, name: str, param: nn.Parameter) -> _Piece:
        keys = self.kinds(name)[1:]
        if self._masters:
            flat, start = self._masters.of(param)
            views = {MASTER: flat} | {key: self.optimizer.state[flat][key] for key in keys}
            return _Piece(0, {kind: view.detach()[start : start + param.numel()] for kind, view in views.items()})
        if not self._sharded:
            views = {MASTER: param} | {key: self.optimizer.state[param][key] for key in keys}
            return _Piece(0, {kind: view.detach().view(-1) for kind, view in views.items()})
        if self.stage == 3:
            views = {MASTER: safe_get_local_fp32_param(param)}
            views |= {key: safe_get_local_optimizer_state(param, key) for key in keys}
            # The parameter is cut into equal slices; the last ones may run past its end into padding.
            start = min(self.rank * views[MASTER].numel(), param.ds_numel)
            length = min(views[MASTER].numel(), param.ds_numel - start)
            return _Piece(start, {kind: view.detach()[:length] for kind, view in views.items()})
        mapping = param._hp_mapping
        if mapping is None:
            return _Piece(0, dict.fromkeys([MASTER, *keys], self._norm.new_empty(0)))
        views = {MASTER: mapping.get_hp_fragment()} | {key: mapping.get_hp_fragment(key) for key in keys}
        return _Piece(mapping.lp_fragment_address.start, {kind: view.detach() for kind, view in views.items()})

    def _place(self, name: str) -> Place:
        """Where this rank's piece lies in the shard of its group, at stages 1 and 2."""
        piece, (flat,) = self._pieces[name], self._groups[name]["params"]
        master = piece.state[MASTER]
        offset = master.storage_offset() - flat.storage_offset() if master.numel() else 0
        return Place(flat, offset, piece.start, master.numel())

    def _set_module_parameter(self, name: str, master: Tensor) -> None:
        param = self._parameters[name]
        if self.stage == 3:
            piece = self._pieces[name]
            length = piece.state[MASTER].numel()
            param.ds_tensor[:length].copy_(master.flatten()[piece.start : piece.start + length])
        # At stage 3 only small parameters, which DeepSpeed keeps whole, have data outside a forward pass.
        if param.data.shape == master.shape:
            param.data.copy_(master)


def _groups_by_name(parameters: dict[str, nn.Parameter], optimizer: AdamWEMA) -> dict[str, dict[str, Any]]:
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    wrong = [name for name, p in parameters.items() if id(p) not in groups]
    if wrong or len(groups) != len(parameters):
        raise ValueError(
            f"the optimizer has {len(groups)} parameters and the module trains {len(parameters)}; not in the "
            f"optimizer: {wrong}; give it every parameter that requires a gradient, and no other"
        )
    return {name: groups[id(p)] for name, p in parameters.items()}


def _initialize(module: nn.Module, optimizer: AdamWEMA, config: dict[str, Any]) -> deepspeed.DeepSpeedEngine:
    """DeepSpeed's engine, whose prints go to the log at level debug."""
    # DeepSpeed warns of an optimizer it has not tested; tests/engine/test_zero.py tests this one.
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    with redirect_stdout(StringIO()) as said:
        engine = deepspeed.initialize(model=module, optimizer=optimizer, config=config, dist_init_required=False)[0]
    log.debug("DeepSpeed: %s", said.getvalue())
    return engine
