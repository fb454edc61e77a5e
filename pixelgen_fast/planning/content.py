"""The tables of a plan, the same for the terminal and the page: titles, columns and cells as text."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from pixelgen_fast.planning.changes import LEAST, Change
from pixelgen_fast.planning.estimate import CASES, CORE_IMAGES, EPOCHS, IMAGENET, RESERVE, Estimate

MOST_PARTS = 14


@dataclass(frozen=True)
class Table:
    """title; head; rows of text, the first column being what a row is of; notes under it."""

    title: str
    head: tuple[str, ...]
    rows: list[tuple[str, ...]]
    notes: tuple[str, ...] = ()


def tables(e: Estimate, changes: list[Change]) -> list[Table]:
    """Every table of a plan, from the step to the run."""
    return [step(e), parts(e), communication(e), memory(e), run(e), loader(e), helping(changes)]


def number(value: float | None, form: str = ".1f", unit: str = "") -> str:
    """A number, or that it is not known."""
    return "not known" if value is None else f"{value:{form}}{unit}"


def step(e: Estimate) -> Table:
    def row(name: str, values: list[str]) -> tuple[str, ...]:
        return (name, *values)

    cases = [e.cases[name] for name in CASES]
    rows = [
        row("matrix products, TFLOP/s", [f"{c.rates.products / 1e12:.0f}" for c in cases]),
        row("memory, TB/s", [f"{c.rates.memory / 1e12:.2f}" for c in cases]),
        row("forward, ms", [f"{1e3 * c.forward:.1f}" for c in cases]),
        row("backward, ms", [f"{1e3 * c.backward:.1f}" for c in cases]),
        row("computed again in backward, ms", [f"{1e3 * c.recompute:.1f}" for c in cases]),
        row("optimizer and averages, ms", [f"{1e3 * c.optimizer:.1f}" for c in cases]),
        row("communication, ms", [f"{1e3 * c.sent:.1f}" for c in cases]),
        row("  of it not hidden, ms", [f"{1e3 * c.shown:.1f}" for c in cases]),
        row("host, beside the GPU, ms", [f"{1e3 * c.host:.1f}" for c in cases]),
        row("step, ms", [f"{1e3 * c.step:.1f}" for c in cases]),
        row("images/s of a GPU", [f"{e.images_per_second(n):,.0f}" for n in CASES]),
        row("model TFLOP/s of a GPU", [f"{e.flops_per_second(n) / 1e12:.0f}" for n in CASES]),
    ]
    card, notes = e.machine.card, ()
    if card.sheet is None:
        notes = (f"No share of the data sheet's rate (MFU): that of {card.name} is not known.",)
    else:
        rows.append(row(f"MFU, of {card.sheet[0] / 1e12:.0f} TFLOP/s", [f"{e.share(n):.1%}" for n in CASES]))
    return Table(f"A step of {e.step.config.train.global_batch} images", ("", *CASES), rows, notes)


def parts(e: Estimate) -> Table:
    """FLOPs, bytes, kept activations and planned time of each part; the smallest together in one row."""
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0] * 6)
    for op in e.step.trace.operations:
        column = 0 if op.phase == "forward" else 1
        found = sums[op.part]
        found[column] += op.flops / e.step.trace.batch / 1e9
        found[2 + column] += op.bytes / e.step.trace.batch / 1e6
    for part, size in e.step.kept.items():
        sums[part][4] += size / 1e6
    for part, times in e.part_seconds("planned").items():
        sums[part][5] += 1e3 * sum(times)
    ordered = sorted(sums.items(), key=lambda item: -item[1][5])
    shown, rest = ordered[:MOST_PARTS], ordered[MOST_PARTS:]
    if rest:
        shown.append((f"smaller ones, {len(rest)}", _added(values for _, values in rest)))
    shown.append(("all", _added(sums.values())))
    head = (
        "part", "GFLOP forward", "GFLOP backward", "MB forward", "MB backward", "MB kept for backward", "planned, ms",
    )  # fmt: skip
    rows = [(part, *(f"{v:.2f}" for v in values[:2]), *(f"{v:.1f}" for v in values[2:])) for part, values in shown]
    notes = (
        "FLOPs and bytes of an image, what is computed again counted in backward; time of a step of one GPU. A stack "
        "of blocks without more behind it is what the blocks do outside of their modules.",
    )
    return Table("Parts", head, rows, notes)


def _added(rows: Iterable[list[float]]) -> list[float]:
    return [sum(column) for column in zip(*rows, strict=True)]


def communication(e: Estimate) -> Table:
    world = e.machine.gpus
    rows = [(f"{c.kind} of {c.of}", f"{c.bytes / 1e9:.3f}", str(c.times), f"{c.wire(world) / 1e9:.3f}") for c in e.sent]
    notes = (f"ZeRO stage {e.stage} on {world} GPUs, by rings; on the wire is what each GPU sends in a step.",)
    if world == 1:
        rows, notes = [], ("One GPU sends nothing.",)
    return Table("Communication", ("", "GB", "times a step", "GB on the wire"), rows, notes)


def memory(e: Estimate) -> Table:
    t, card = e.step.config.train, e.machine.card
    rows = []
    for stage in e.step.config.optimizer.stages:
        largest = e.largest(stage)
        fits = "not known" if largest is None else f"{largest:,}"
        cells = (e.state_bytes(stage), e.step.peak, e.memory(stage))
        chosen = " (configured)" if stage == e.stage else ""
        rows.append((f"ZeRO stage {stage}{chosen}", *(f"{b / 1e9:.1f}" for b in cells), fits))
    has = "whose memory is not known" if card.memory is None else f"which has {card.memory / 1e9:.0f} GB"
    notes = [
        f"GB on each {card.name}, {has}; {RESERVE / 1e9:.0f} GB of it are left to CUDA and libraries (assumed). State: "
        "weights, gradients, optimizer, averages, frozen networks, buckets.",
    ]
    if not e.fits():
        notes.append(
            f"DOES NOT FIT: a micro-batch of {t.micro_batch} at stage {e.stage}. Try a smaller train.micro_batch, "
            "train.recompute=operators or blocks, or a higher train.zero_stage."
        )
    head = ("", "state", f"activations of {t.micro_batch} images", "together", "largest micro-batch")
    return Table("Memory", head, rows, tuple(notes))


def run(e: Estimate) -> Table:
    configured = e.step.config.train.images
    counts = [("as configured", configured), *((f"{n} epochs of ImageNet", n * IMAGENET) for n in EPOCHS)]
    rows = []
    for name, images in counts:
        hours = (number(e.hours(case, images), ",.1f") for case in CASES)
        energy = (number(e.energy(case, images), ",.0f") for case in CASES[1:])
        rows.append((name, f"{images:,}", *hours, *energy))
    head = ("", "images", *(f"h, {case}" for case in CASES), *(f"kWh, {case}" for case in CASES[1:]))
    power = e.machine.card.power
    said = "No energy: the card's power is not known." if power is None else f"Energy of the GPUs, {power:g} W each."
    return Table(f"The run on {e.machine.gpus} GPUs", head, rows, (f"Hours of training steps alone. {said}",))


def loader(e: Estimate) -> Table:
    rows = []
    for case in CASES:
        needed, cores, share = e.loader(case)
        engines = "not known" if share is None else f"{share:.0%}"
        of_node = needed / e.machine.nodes, cores / e.machine.nodes
        rows.append((case, f"{needed:,.0f}", f"{of_node[0]:,.0f}", f"{of_node[1]:.1f}", engines))
    notes = (f"Cores at {CORE_IMAGES} JPEG images a second each, measured; pixelgen data bench measures yours.",)
    head = ("", "images/s", "of a node", "cores of a node", "or share of each GPU's JPEG engines")
    return Table("Loader", head, rows, notes)


def helping(changes: list[Change]) -> Table:
    rows = [(change.text, f"{change.gain:.1%}") for change in changes]
    notes = (
        "Of the time of an image as planned; gains do not add up."
        if rows
        else f"No change that is known here would save {LEAST:.1%} of the time of an image.",
    )
    return Table("What would help most", ("change", "saves"), rows, notes)


def heading(e: Estimate) -> str:
    """What the plan is of, in one paragraph."""
    t, m, s = e.step.config.train, e.machine, e.step
    again = f", recompute {t.recompute}" if t.recompute != "none" else ""
    return (
        f"{s.config.model.system}, {sum(s.parameters):,} trained parameters, {s.config.data.image_size} px, bf16, on "
        f"{m.gpus} x {m.card.name} in {m.nodes} node{'s' * (m.nodes > 1)}: {t.micro_batch} images x {e.accumulation} a "
        f"GPU and step, ZeRO stage {t.zero_stage}{again}. Modelled from the traced step, not measured."
    )


def sources(e: Estimate) -> list[str]:
    """Where the numbers of the card come from."""
    about = [
        "floor: the card's ceilings; planned: their share that the best publicly measured training block reached "
        "(630 TFLOP/s and 2.8 TB/s of an H100); pessimistic: 1.5 times the time at the ceilings, nothing hidden"
    ]
    return about + [f"{key}: {text}" for key, text in e.machine.card.sources.items() if key != "gpu"]
