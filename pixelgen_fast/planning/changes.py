"""What would shorten the planned step most: settings traced anew, and what is left between plan and ceilings.

A change of a setting is traced with that setting and must fit in memory; the others are arithmetic on the same trace
and say how much there is to gain at most. Gains are of the time of an image, and do not add up.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace

from pixelgen_fast.config import Config
from pixelgen_fast.planning.estimate import Estimate
from pixelgen_fast.planning.step import trace_step

LEAST = 0.002  # share of the step below which a change is not worth a line


@dataclass(frozen=True)
class Change:
    """text: what to do. gain: the share of an image's planned time that it saves, at most where text says so."""

    text: str
    gain: float


def helpful(estimate: Estimate, count: int = 3) -> list[Change]:
    """The changes with the largest gains, the largest first."""
    found = [*_settings(estimate), *_sent(estimate), *_bound(estimate), *_frozen(estimate), *_products(estimate)]
    found = [change for change in found if change.gain >= LEAST]
    return sorted(found, key=lambda change: -change.gain)[:count]


def _settings(now: Estimate) -> Iterator[Change]:
    """Settings of `train` that can be traced: a larger micro-batch, less recomputation, a lower stage."""
    before, t = now.images_per_second("planned"), now.step.config.train
    other = []
    per_rank, largest = t.global_batch // now.machine.gpus, now.largest(now.stage)
    sizes = [n for n in range(t.micro_batch + 1, per_rank + 1) if per_rank % n == 0 and n <= (largest or per_rank)]
    if sizes:
        other.append(("micro_batch", sizes[-1]))
    weaker = {"blocks": ("operators", "none"), "operators": ("none",), "none": ()}[t.recompute]
    other += [("recompute", recompute) for recompute in weaker]
    other += [("zero_stage", stage) for stage in range(1, t.zero_stage)]
    if now.machine.gpus == 1 and now.accumulation == 1 and not t.cuda_graph:
        other.append(("cuda_graph", True))
    for key, value in other:
        changed = replaced(now, **{key: value})
        if changed.fits():
            text = f"train.{key}={str(value).lower()}"
            yield Change(text, 1 - before / changed.images_per_second("planned"))


def replaced(now: Estimate, **settings: object) -> Estimate:
    """The estimate with other settings of `train`."""
    config: Config = now.step.config
    config = replace(config, train=replace(config.train, **settings))
    again = settings.keys() & {"micro_batch", "recompute"}
    step = trace_step(config, now.machine.gpus) if again else replace(now.step, config=config)
    return Estimate(step, now.machine)


def _sent(now: Estimate) -> Iterator[Change]:
    case = now.cases["planned"]
    hidden = max(0.0, case.sent - case.forward - case.backward - case.recompute)
    gain = case.step - max(case.gpu - case.shown + hidden, case.host)
    text = "send beside the computation what ranks now wait for (DeepSpeed's overlap_comm): at most"
    yield Change(text, gain / case.step)


def _bound(now: Estimate) -> Iterator[Change]:
    """What memory and instructions cost beyond matrix products, in the part where that is most."""
    case, beyond = now.cases["planned"], defaultdict(float)
    for op in now.step.trace.operations:
        beyond[op.part] += now.accumulation * (op.seconds(case.rates) - op.flops / case.rates.products)
    part, most = max(beyond.items(), key=lambda item: item[1])
    yield Change(f"fuse what memory binds in {part}: at most", _share(now, most))


def _products(now: Estimate) -> Iterator[Change]:
    case, limit = now.cases["planned"], now.machine.card.limits.products
    bound = [op for op in now.step.trace.operations if op.flops / case.rates.products >= op.bytes / case.rates.memory]
    flops = now.accumulation * sum(op.flops for op in bound)
    yield Change(
        f"matrix products at {limit / 1e12:.0f} TFLOP/s instead of {case.rates.products / 1e12:.0f}: at most",
        _share(now, flops / case.rates.products - flops / limit),
    )


def _frozen(now: Estimate) -> Iterator[Change]:
    gain = now.frozen_seconds("planned")
    a = now.step.config.alignment
    how = "alignment.cache=DIR keeps the teacher's features" if a.teacher else "keep what frozen networks give"
    if gain:
        yield Change(f"{how}: at most", _share(now, gain))


def _share(now: Estimate, seconds: float) -> float:
    """Of the planned step, seconds that the GPU would save; none where the host is what it waits for."""
    case = now.cases["planned"]
    return (case.step - max(case.gpu - seconds, case.host)) / case.step
