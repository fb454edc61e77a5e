"""A training step on the meta device, operation by operation: what each moves, computes, starts and belongs to.

    bytes    its input and output tensors, each storage once; a view moves nothing
    FLOPs    by the registered formulas, PyTorch's and ours
    kernels  the launches of one of our operators, recorded on the very arguments; one for an operation of PyTorch
    limits   what the committed report models of these launches; a launch that is larger or smaller than the report's is
             scaled by the bytes it moves, one that the report does not list counts by its tensors

Nothing is computed and no weight is read: the shapes decide. Caches, overlap and launch gaps are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from pixelgen_kernels.launch import Started, recording
from pixelgen_kernels.registration import LAUNCHERS, NAMESPACE
from pixelgen_kernels.registry import OPERATORS
from pixelgen_kernels.report.listing import listed
from pixelgen_kernels.report.rules import read_baseline
from pixelgen_kernels.shapes import ModelShape
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from pixelgen_fast.planning.rates import Rates

ALLOCATIONS = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"}
OVERWRITES = {"fill_", "zero_", "copy_", "normal_", "random_", "_foreach_copy_", "_foreach_zero_"}
Phase = Literal["forward", "backward", "recompute", "optimizer"]
Limits = Mapping[str, float]


@dataclass(frozen=True)
class Operation:
    """One dispatched operation. limits: of its launches, as the report models them. wide: its products are of nothing
    in bf16."""

    name: str
    part: str
    phase: Phase
    kernels: int
    bytes: int
    flops: int
    limits: tuple[Limits, ...] = ()
    wide: bool = False

    def seconds(self, rates: Rates) -> float:
        # without a modelled time, the tensors alone say how long it takes
        ours = sum(rates.time_of(limits) for limits in self.limits)
        return max(rates.time(self.flops, self.bytes, self.wide), ours)


@dataclass
class Trace:
    """The operations of a step of `batch` images. unlisted: launches of ours that the report does not list."""

    batch: int
    operations: list[Operation] = field(default_factory=list)
    unlisted: set[str] = field(default_factory=set)

    def total(self, of: str, *phases: Phase) -> int:
        """Sum of bytes, flops or kernels, over the phases given or all."""
        return sum(getattr(op, of) for op in self.operations if not phases or op.phase in phases)

    def seconds(self, rates: Rates, *phases: Phase) -> float:
        return sum(op.seconds(rates) for op in self.operations if not phases or op.phase in phases)


@dataclass
class Modelled:
    """The report's launches by Triton's key, with their modelled microseconds by limit."""

    limits: dict[tuple[Any, ...], tuple[Started, Limits]] = field(default_factory=dict)

    def of(self, started: Started) -> Limits | None:
        """The limits of a launch, scaled to its size; None for one that is not listed."""
        if started.key not in self.limits:
            return None
        same, limits = self.limits[started.key]
        size = started.launch.bytes_moved / same.launch.bytes_moved
        return {name: us * size for name, us in limits.items()}


def modelled(shapes: Iterable[ModelShape], baseline: Path) -> Modelled:
    """Times of the committed report for models. Raises ValueError when the baseline is not that of this version."""
    times = read_baseline(baseline)
    found = listed(OPERATORS, shapes)
    if absent := [item.key for item in found if item.key not in times]:
        raise ValueError(f"{baseline} lacks {', '.join(absent)}; pixelgen kernels report --update-baseline writes it")
    return Modelled({item.started.key: (item.started, times[item.key]) for item in found})


class Recorder(TorchDispatchMode):
    """Adds every operation that is dispatched to a trace. now: its (part, phase)."""

    def __init__(self, into: Trace, ours: Modelled, now: Callable[[], tuple[str, Phase]]) -> None:
        super().__init__()
        self.into, self.ours, self.now = into, ours, now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func._schema.name.split("::")[1]
        read = _storages(x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor))
        results = _storages(x for x in tree_leaves(out) if isinstance(x, Tensor))
        written = {k: n for k, n in results.items() if k not in read} | _storages(_changed(func, args, kwargs))
        if not written or name in ALLOCATIONS:
            return out
        if name in OVERWRITES:
            read = {k: n for k, n in read.items() if k not in written}
        formula = flop_registry.get(func.overloadpacket)
        flops = formula(*args, **kwargs, out_val=out) if formula else 0
        started = self.launches(func, args, kwargs)
        limits = tuple(found for launch in started if (found := self.ours.of(launch)) is not None)
        moved = sum(read.values()) + sum(written.values())
        wide = flops > 0 and all(x.dtype != torch.bfloat16 for x in tree_leaves(args) if isinstance(x, Tensor))
        self.into.operations.append(Operation(name, *self.now(), len(started) or 1, moved, flops, limits, wide))
        return out

    def launches(self, func: Any, args: Any, kwargs: Any) -> list[Started]:
        """What an operation of ours starts on these arguments; those that the report does not list are noted."""
        if func.namespace != NAMESPACE:
            return []
        name = func._schema.name.split("::")[1]
        with recording() as started:
            LAUNCHERS[name](*args, **kwargs)
        self.into.unlisted |= {f"{name}: {s.launch.name}" for s in started if s.key not in self.ours.limits}
        return started


def _storages(tensors: Iterator[Tensor]) -> dict[int, int]:
    """Bytes of each storage that the tensors touch, at most its size: an expanded tensor is read once."""
    found: dict[int, int] = {}
    size = {}
    for x in tensors:
        storage = x.untyped_storage()
        size[storage._cdata] = storage.nbytes()
        found[storage._cdata] = found.get(storage._cdata, 0) + x.numel() * x.element_size()
    return {k: min(n, size[k]) for k, n in found.items()}


def _changed(func: Any, args: Any, kwargs: Any) -> Iterator[Tensor]:
    """The tensors among the arguments that an operation writes into."""
    for number, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[number] if number < len(args) else kwargs.get(argument.name)
            yield from (x for x in tree_leaves(value) if isinstance(x, Tensor))
