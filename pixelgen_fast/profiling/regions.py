"""Regions of a step for the profiler: a range for each call of a named part, and for each stage of the step.

A range bears the path of its module, so that a trace shows each block; `Regions.parts` knows the part of each. Work is
counted beside it, in a step of its own: FLOPs by the formulas of PyTorch and of the operators, bytes of the tensors
that an operator reads and writes, each once, and what each part keeps for backward.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import record_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from pixelgen_fast.engine.parts import LOSS, part_of_objective

STAGES = ("loader", "forward", "backward", "optimizer")
Shapes = tuple[tuple[int, ...], ...]


class Regions:
    """Ranges while it is entered: hooks on the modules of an objective, which are gone afterwards.

    stack: the parts that are being computed, outermost first.
    """

    def __init__(self, objective: nn.Module) -> None:
        self.named = dict(_watched(objective))
        self.parts = {path: part for path, (part, _) in self.named.items()}
        self.stack: list[str] = []
        self._open: list[record_function] = []
        self._stage: record_function | None = None
        self._hooks = ExitStack()

    def __enter__(self) -> Regions:
        for path, (part, module) in self.named.items():
            self._hooks.callback(module.register_forward_pre_hook(self._begin(path, part)).remove)
            self._hooks.callback(module.register_forward_hook(self._end, always_call=True).remove)
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.close()

    def _begin(self, path: str, part: str) -> Callable[..., None]:
        def begin(*_: object) -> None:
            self.stack.append(part)
            self._open.append(record_function(path))
            self._open[-1].__enter__()

        return begin

    def _end(self, *_: object) -> None:
        self._open.pop().__exit__(None, None, None)
        self.stack.pop()

    def at(self, stage: str) -> None:
        """A stage of the step begins, and the one before ends."""
        self.leave()
        self._stage = record_function(stage)
        self._stage.__enter__()

    def leave(self) -> None:
        """The last stage has ended."""
        if self._stage is not None:
            self._stage.__exit__(None, None, None)
            self._stage = None


def _watched(objective: nn.Module) -> Iterator[tuple[str, tuple[str, nn.Module]]]:
    """(path, (part, module)) where a part begins: the objective, its model, and what is another part than around it."""
    around: dict[str, str] = {}
    for path, module in objective.named_modules():
        part = part_of_objective(path)
        above = path.rpartition(".")[0]
        around[path] = part
        if isinstance(module, nn.ModuleList | nn.ModuleDict):
            continue
        if not path or part != around[above] or isinstance(objective.get_submodule(above), nn.ModuleList):
            yield path or "objective", (part, module)


def weights_by_part(objective: nn.Module, called: Collection[str]) -> dict[str, int]:
    """Bytes of the parameters of each part. called: the parts that there are; what another module reads is its."""
    found: dict[str, int] = defaultdict(int)
    for path, parameter in objective.named_parameters():
        part = part_of_objective(path.rpartition(".")[0])
        while part not in called and "." in part:
            part = part.rpartition(".")[0]
        found[part] += parameter.nbytes
    return dict(found)


@dataclass
class Work:
    """Of the calls of an operator with the same shapes."""

    calls: int = 0
    flops: int = 0
    nbytes: int = 0


@dataclass
class Counted:
    """work: by operator and the shapes of its tensors. saved: bytes kept for backward, by part."""

    work: dict[tuple[str, Shapes], Work] = field(default_factory=lambda: defaultdict(Work))
    saved: dict[str, int] = field(default_factory=lambda: defaultdict(int))


@contextmanager
def counting(regions: Regions, weights: Mapping[str, Tensor]) -> Iterator[Counted]:
    """Count the work of what is inside, and what it keeps for backward beside the weights."""
    counted = Counted()
    seen = {w.untyped_storage()._cdata for w in weights.values()}
    alive: list[Tensor] = []  # a storage that were freed could come back as another tensor's

    def pack(x: Tensor) -> Tensor:
        place = x.untyped_storage()._cdata
        if place not in seen:
            seen.add(place)
            alive.append(x.detach())
            counted.saved[regions.stack[-1] if regions.stack else LOSS] += x.untyped_storage().nbytes()
        return x

    with _Counter(counted), saved_tensors_hooks(pack, lambda x: x):
        yield counted


class _Counter(TorchDispatchMode):
    """Adds up the work of every operator that is dispatched."""

    def __init__(self, counted: Counted) -> None:
        super().__init__()
        self.counted = counted

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        packet = func._overloadpacket
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        work = self.counted.work[packet._qualified_op_name, shapes_of(x.shape for x in given)]
        work.calls += 1
        if packet in flop_registry:
            work.flops += flop_registry[packet](*args, **kwargs, out_val=out)
        work.nbytes += _traffic(func, args, kwargs, given, out)
        return out


def shapes_of(shapes: Any) -> Shapes:
    """Shapes as a key; those without a dimension are left out, as the profiler has numbers in their place."""
    return tuple(tuple(shape) for shape in shapes if len(shape))


def _traffic(func: Any, args: tuple, kwargs: dict, given: list[Tensor], out: Any) -> int:
    """Bytes of the inputs and outputs, each once, and once more of what is changed in place; none of a view."""
    there = {x.untyped_storage()._cdata for x in given}
    made = [x for x in tree_leaves(out) if isinstance(x, Tensor) and x.untyped_storage()._cdata not in there]
    values = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
    written = [values.get(a.name) for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    changed = [x for x in tree_leaves(written) if isinstance(x, Tensor)]
    if not made and not changed:
        return 0
    return sum(x.nbytes for x in (*given, *made, *changed)) - _overwritten(func, changed)


def _overwritten(func: Any, changed: list[Tensor]) -> int:
    """Bytes of what is written without being read before."""
    blind = func._overloadpacket.__name__ in ("copy_", "zero_", "fill_") or func._schema.name.endswith(".out")
    return sum(x.nbytes for x in changed) if blind else 0
