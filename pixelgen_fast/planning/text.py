"""A plan for the terminal, and as plain data."""

from __future__ import annotations

from typing import Any

from pixelgen_fast.planning.changes import Change
from pixelgen_fast.planning.content import Table, heading, sources, tables
from pixelgen_fast.planning.estimate import CASES, EPOCHS, IMAGENET, Estimate


def as_text(e: Estimate, changes: list[Change]) -> str:
    """Every table, columns aligned."""
    blocks = [heading(e), *(_block(table) for table in tables(e, changes))]
    return "\n\n".join([*blocks, "Sources\n" + "\n".join(f"  {line}" for line in sources(e))])


def _block(table: Table) -> str:
    lines = [table.head, *table.rows] if table.rows else []
    widths = [max(len(line[i]) for line in lines) for i in range(len(table.head))] if lines else []
    out = [table.title]
    for line in lines:
        cells = [line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]
        out.append("  " + "  ".join(cells).rstrip())
    return "\n".join([*out, *(f"  {note}" for note in table.notes)])


def as_data(e: Estimate, changes: list[Change]) -> dict[str, Any]:
    """The plan as JSON takes it; what is not known is null."""
    t, m = e.step.config.train, e.machine
    return {
        "config": {"system": e.step.config.model.system, "images": t.images, "global_batch": t.global_batch},
        "machine": {"gpu": m.card.name, "gpus": m.gpus, "nodes": m.nodes, "sources": m.card.sources},
        "parameters": sum(e.step.parameters),
        "model_flops_per_image": e.step.model_flops,
        "parts": _parts(e),
        "cases": {name: _case(e, name) for name in CASES},
        "communication": [vars(c) | {"wire": c.wire(m.gpus)} for c in e.sent],
        "memory": {
            f"stage {stage}": {
                "state": e.state_bytes(stage),
                "activations": e.step.peak,
                "largest_micro_batch": e.largest(stage),
            }
            for stage in (1, 2, 3)
        },
        "scaling": {str(n): e.scaled(n, "planned") for n in (2**k for k in range(11))} if e.scales else None,
        "changes": [vars(change) for change in changes],
    }


def _parts(e: Estimate) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for op in e.step.trace.operations:
        part = found.setdefault(op.part, {})
        for key, value in (("flops", op.flops), ("bytes", op.bytes), ("kernels", op.kernels)):
            part[f"{op.phase}_{key}"] = part.get(f"{op.phase}_{key}", 0) + value
    for name, size in e.step.kept.items():
        found.setdefault(name, {})["kept_bytes_per_image"] = size
    return found


def _case(e: Estimate, name: str) -> dict[str, Any]:
    case = e.cases[name]
    counts = {"configured": e.step.config.train.images} | {f"{n} epochs": n * IMAGENET for n in EPOCHS}
    seconds = {k: v for k, v in vars(case).items() if k not in ("name", "rates")}
    return seconds | {
        "step": case.step,
        "rates": vars(case.rates),
        "images_per_second": e.images_per_second(name),
        "flops_per_second": e.flops_per_second(name),
        "mfu": e.share(name),
        "hours": {key: e.hours(name, images) for key, images in counts.items()},
        "kwh": {key: e.energy(name, images) for key, images in counts.items()},
        "loader_images_per_second": e.loader(name)[0],
    }
