"""From the profiler's events to a ledger: time by part and stage, time in which nothing ran, the heaviest operators.

Every event has the time of its own, without that of the events inside it; on one thread these add up to the whole. It
belongs to the innermost region around it. In backward there is none: there the node of autograd that is being run tells
by its sequence number which operator of forward made it, and in which region that was.

On a CPU the time is the thread's, and idle is waiting for images and what no operator ran: Python and DeepSpeed. On a
GPU it is that of the kernels, counted for the operator that started them, and idle is where none runs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch.autograd import DeviceType

from pixelgen_fast.profiling.regions import STAGES, Shapes, Work, shapes_of

STEP = "step"
ENGINE, GRADIENTS = "engine and Python", "adding up gradients"
_BACKWARD_SCOPE = 1  # RecordScope::BACKWARD_FUNCTION
_NODE = "autograd::engine::evaluate_function: "


@dataclass(frozen=True)
class Heavy:
    """All calls of an operator with the same shapes. seconds, calls: a step. kernel: the longest it started."""

    name: str
    shapes: Shapes
    calls: float
    seconds: float
    kernel: str = ""


@dataclass
class Ledger:
    """Seconds a step. parts: by (part, stage). idle: in which nothing ran. whole: of the profiled step.

    waiting: of idle, for images.
    """

    whole: float
    parts: dict[tuple[str, str], float] = field(default_factory=lambda: defaultdict(float))
    idle: float = 0.0
    waiting: float = 0.0
    busy: float = 0.0
    heavy: list[Heavy] = field(default_factory=list)


def keep(events: Iterable[Any], parts: Mapping[str, str], steps: int, gpu: bool) -> Ledger:
    """The ledger of the steps that lie in ranges named STEP.

    events: of torch.profiler's `events()`, with shapes. parts: the part of each region. gpu: whether kernels count.
    """
    everything = list(events)
    host = [e for e in everything if e.device_type == DeviceType.CPU]
    annotations = {*parts, *STAGES, STEP}
    makers = _makers(host, parts)
    ledger = Ledger(sum(e.time_range.elapsed_us() for e in host if e.name == STEP) / steps / 1e6)
    heavy: dict[tuple[str, Shapes], list[Any]] = defaultdict(list)
    for event in host:
        above = list(_upwards(event))
        if not gpu and not any(e.name == STEP for e in above):
            continue
        if gpu and event.name in annotations:  # whose time there is that of the kernels inside
            continue
        own = _own(event, gpu) / steps / 1e6
        part, stage = _owner(above, parts, makers)
        if own:
            ledger.parts[part, stage] += own
        if event.name not in annotations:
            heavy[event.name, shapes_of(_flat(event.input_shapes))].append(event)
        elif stage != "loader":
            ledger.idle += own
        if not gpu and stage == "loader":
            ledger.waiting += own
            ledger.idle += own
    ledger.busy = _union(everything) / steps / 1e6 if gpu else ledger.whole - ledger.idle
    ledger.heavy = sorted((_heavy(key, found, steps, gpu) for key, found in heavy.items()), key=lambda h: -h.seconds)
    return ledger


def _own(event: Any, gpu: bool) -> float:
    """Microseconds of an event, without the events inside it: of the kernels that it started, or of the thread."""
    return sum(k.duration for k in event.kernels) if gpu else event.self_cpu_time_total


def _upwards(event: Any) -> Iterable[Any]:
    while event is not None:
        yield event
        event = event.cpu_parent


def _is_node(event: Any) -> bool:
    return event.scope == _BACKWARD_SCOPE or event.name.startswith(_NODE)


def _makers(host: Collection[Any], parts: Mapping[str, str]) -> dict[int, str]:
    """The part of the operator that made each node of autograd, by the node's sequence number.

    Several operators begin while a number is the next to be given; the last of them made the node.
    """
    found = {}
    for event in sorted(host, key=lambda e: e.time_range.start):
        if event.sequence_nr >= 0 and not _is_node(event):
            part = next((parts[e.name] for e in _upwards(event) if e.name in parts), None)
            if part is not None:
                found[event.sequence_nr] = part
    return found


def _owner(above: list[Any], parts: Mapping[str, str], makers: Mapping[int, str]) -> tuple[str, str]:
    """(part, stage) of an event. above: it and the events around it, innermost first."""
    nodes = [e for e in above if _is_node(e)]
    stage = "backward" if nodes else next((e.name for e in above if e.name in STAGES), "")
    part = next((parts[e.name] for e in above if e.name in parts), None)
    if part is None and nodes:
        made = next((makers[e.sequence_nr] for e in nodes if e.sequence_nr in makers), None)
        part = made or (GRADIENTS if any("AccumulateGrad" in e.name for e in nodes) else ENGINE)
    if part is None:
        part = stage if stage in ("loader", "optimizer") else ENGINE
    return part, stage


def _flat(shapes: Any) -> Iterable[Any]:
    """The shapes of tensors among those that the profiler gives, in which lists of tensors are lists of shapes."""
    for shape in shapes or ():
        if shape and isinstance(shape[0], list | tuple):
            yield from shape
        else:
            yield shape


def _heavy(key: tuple[str, Shapes], found: list[Any], steps: int, gpu: bool) -> Heavy:
    own = sum(_own(e, gpu) for e in found)
    longest = max((k for e in found for k in e.kernels), key=lambda k: k.duration, default=None)
    return Heavy(*key, len(found) / steps, own / steps / 1e6, longest.name if longest else "")


def _union(events: Iterable[Any]) -> float:
    """Microseconds in which at least one kernel or copy runs on a GPU."""
    spans = sorted(
        (e.time_range.start, e.time_range.end)
        for e in events
        if e.device_type != DeviceType.CPU and not e.is_user_annotation
    )
    total, reached = 0.0, float("-inf")
    for begin, end in spans:
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total


def work_of(heavy: Heavy, counted: Mapping[tuple[str, Shapes], Work]) -> tuple[float, float] | None:
    """(FLOPs, bytes) of one call, by name and shapes; of our operators else the mean over what has the name.

    Eager code on a GPU calls the kernels by nodes of autograd, `swiglu` and `swigluBackward`; where work is counted
    they are dispatched, as pixelgen::swiglu and pixelgen::swiglu_backward. None where nothing was counted.
    """
    found = [counted[heavy.name, heavy.shapes]] if (heavy.name, heavy.shapes) in counted else []
    if not found and not heavy.name.startswith("aten::"):
        name = heavy.name.rpartition("::")[2]
        name = f"{name.removesuffix('Backward')}_backward" if name.endswith("Backward") else name
        found = [work for (other, _), work in counted.items() if other.rpartition("::")[2] == name]
    calls = sum(work.calls for work in found)
    if not calls:
        return None
    return sum(w.flops for w in found) / calls, sum(w.nbytes for w in found) / calls
