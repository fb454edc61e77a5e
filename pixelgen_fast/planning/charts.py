"""The charts of a plan as SVG: the roofline, the time of each part, and what more GPUs give."""

from __future__ import annotations

from collections import defaultdict
from io import StringIO

import numpy as np

from pixelgen_fast.eval.curves import png_figures
from pixelgen_fast.planning.estimate import CASES, Estimate

COLOURS = ("#1f4e79", "#c1440e", "#2e7d32", "#7b3f99", "#b8860b", "#008b8b", "#a0522d", "#d81b60", "#6b8e23", "#4682b4")
REST = "#b0b0b0"
LINES = {"floor": ("#2e7d32", "--"), "planned": ("#1f4e79", "-"), "pessimistic": ("#c1440e", ":")}
LEAST = 0.01  # share of the step of a part that has a colour of its own


def _figure(height: float):
    _, Figure = png_figures()
    figure = Figure(figsize=(9.6, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _svg(figure) -> str:
    out = StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    text = out.getvalue()
    return text[text.index("<svg") :]


def colours(e: Estimate) -> dict[str, str]:
    """A colour for each of the slowest parts."""
    least = LEAST * e.cases["planned"].step
    slow = [part for part, times in e.part_seconds("planned").items() if sum(times) >= least]
    return dict(zip(slow, COLOURS, strict=False))


def roofline(e: Estimate) -> str:
    """Every operation of the step by its intensity and the rate that the plan gives it; area: its time."""
    figure, axes = _figure(5.0)
    floor, case = e.cases["floor"].rates, e.cases["planned"]
    reach = np.logspace(-2, 4.5, 200)
    for name, rates in (("floor", floor), ("planned", case.rates)):
        colour, style = LINES[name]
        roof = np.minimum(rates.products, reach * rates.memory) / 1e12
        axes.plot(reach, roof, style, color=colour, linewidth=1.3, label=f"roof, {name}")
    palette, points = colours(e), defaultdict(lambda: defaultdict(float))
    for op in e.step.trace.operations:
        if op.flops:
            key = (op.part if op.part in palette else "other parts", op.flops, op.bytes, op.seconds(case.rates))
            points[key[0]][key[1:]] += op.seconds(case.rates)
    slowest = max((time for found in points.values() for time in found.values()), default=1.0)
    for part in [*(p for p in palette if p in points), *(p for p in points if p not in palette)]:
        found = points[part]
        x = [flops / moved for flops, moved, _ in found]
        y = [flops / seconds / 1e12 for flops, _, seconds in found]
        area = [12 + 500 * time / slowest for time in found.values()]
        axes.scatter(x, y, s=area, color=palette.get(part, REST), alpha=0.55, linewidths=0, label=part)
    axes.set(xscale="log", yscale="log", xlabel="FLOP for each byte moved", ylabel="TFLOP/s")
    low = min((flops / moved for found in points.values() for flops, moved, _ in found), default=1.0)
    axes.set_xlim(max(0.05, low / 3), 3e4)
    axes.set_ylim(max(0.05, low / 3) * case.rates.memory / 1e12 / 2, floor.products / 1e12 * 1.6)
    axes.grid(alpha=0.2, which="major")
    for handle in axes.legend(frameon=False, fontsize="small", loc="lower right").legend_handles[2:]:
        handle.set_sizes([40])
    return _svg(figure)


def stacked(e: Estimate) -> str:
    """The step in each case, stacked by part."""
    figure, axes = _figure(3.4)
    palette = colours(e)
    names = [*palette, "other parts", "optimizer", "communication, not hidden", "waiting for the host"]
    shades = {**palette, "other parts": REST, names[-3]: "#444444", names[-2]: "#f0a202", names[-1]: "#e4e4e4"}
    values = {name: [] for name in names}
    for name in CASES:
        case, found = e.cases[name], {part: sum(times) for part, times in e.part_seconds(name).items()}
        for part in palette:
            values[part].append(found.pop(part, 0.0))
        last = (sum(found.values()), case.optimizer, case.shown, case.step - case.gpu)
        for key, value in zip(names[-4:], last, strict=True):
            values[key].append(value)
    left = np.zeros(len(CASES))
    for name in names:
        if sum(values[name]) > 0.002 * sum(e.cases[c].step for c in CASES):
            row = 1e3 * np.array(values[name])
            axes.barh(CASES, row, left=left, color=shades[name], label=name, height=0.62)
            left += row
    for place, total in enumerate(left):
        axes.text(total + 0.01 * left.max(), place, f"{total:.0f} ms", va="center", fontsize="small")
    axes.invert_yaxis()
    axes.set_xlim(0, 1.1 * left.max())
    axes.set_xlabel("ms of a step")
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize="small")
    return _svg(figure)


def scaling(e: Estimate) -> str:
    """Images/s of 1 to 1,024 GPUs, together and of each, every one with the images of this plan."""
    _, Figure = png_figures()
    figure = Figure(figsize=(9.6, 3.8), layout="constrained")
    together, each = figure.subplots(1, 2)
    counts = [2**k for k in range(11)]
    for name in CASES:
        colour, style = LINES[name]
        found = np.array([e.scaled(n, name) for n in counts])
        together.plot(counts, found, style, color=colour, marker="o", markersize=3.5, label=name)
        each.plot(counts, found / counts, style, color=colour, marker="o", markersize=3.5)
        share = found[-1] / counts[-1] / found[0]
        each.annotate(
            f"{share:.0%}", (counts[-1], found[-1] / counts[-1]), xytext=(6, -3), textcoords="offset points",
            fontsize="small", color=colour,
        )  # fmt: skip
    together.set(yscale="log", ylabel="images/s of all")
    each.set(ylabel="images/s of a GPU", ylim=(0, None))
    for panel in (together, each):
        panel.set(xscale="log", xlabel="GPUs")
        panel.set_xticks(counts[::2], [f"{n:,}" for n in counts[::2]])
        panel.minorticks_off()
        panel.grid(alpha=0.2)
        panel.spines[["top", "right"]].set_visible(False)
    together.legend(frameon=False, fontsize="small", loc="upper left")
    return _svg(figure)
