"""The rows of a visit as a page to read, as ceilings for the report, and as a table of tuned configurations.

day.md             tables of every part, what disagrees or is missing, card, date, versions, commit
ceilings.json      what `pixelgen kernels report --ceilings` takes
tuned/<gpu>.json   what belongs into kernels/pixelgen_kernels/tuned, once somebody has read it
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gpu.sides import TOLERANCES, compare, name_of
from gpu.visit import Key, Result

Row = Mapping[str, Any]
Results = Mapping[Key, Result]


def write(out: Path, results: Results, missing: Sequence[str]) -> list[str]:
    """Write the three into a folder; returns what is red or missing."""
    bad = reds(results) + list(missing)
    (out / "day.md").write_text(page(results, bad))
    about = machine_of(results)
    if about:
        if found := ceilings(results, about):
            (out / "ceilings.json").write_text(json.dumps(found, indent=1) + "\n")
        if any(part == "tuning" for part, _ in results):
            target = out / "tuned" / f"{short_name(about['machine'])}.json"
            target.parent.mkdir(exist_ok=True)
            target.write_text(tuned(results))
    return bad


def machine_of(results: Results) -> dict[str, str]:
    """What the last task that began says of its machine; empty before one has."""
    return next((result.about for result in reversed(results.values()) if result.about), {})


def rows_of(results: Results, *parts: str) -> list[Row]:
    return [row for (part, _), result in results.items() if part in parts for row in result.rows]


def reds(results: Results) -> list[str]:
    """Everything that a task found wrong, and the sides of a step that disagree."""
    found = [f"{part} {task}: {red}" for (part, task), result in results.items() for red in result.reds]
    return found + [
        f"step {c.name} disagrees with {c.against}: loss {c.loss:.1e}, gradient norm {c.norm:.1e}, gradient of "
        f"{c.worst} {c.gradient:.1e}"
        for c in comparisons(results)
        if c.red
    ]


def comparisons(results: Results) -> list:
    steps = [row for row in rows_of(results, "step", "variants") if "losses" in row]
    return compare(steps, device_of(results)) if steps else []


def disagreeing(results: Results) -> set[Key]:
    """The tasks whose step agrees with no other side: to be measured again, once the cause is repaired."""
    names = {c.name for c in comparisons(results) if c.red}
    return {key for key, result in results.items() for row in result.rows if "losses" in row and name_of(row) in names}


def device_of(results: Results) -> str:
    """ "cuda" or "cpu": only a processor is named with its threads."""
    return "cpu" if machine_of(results).get("machine", "").endswith("threads") else "cuda"


def short_name(machine: str) -> str:
    """The word of a card's name that says which it is: "NVIDIA H100 80GB HBM3" is h100. "cpu" of a processor."""
    words = machine.lower().replace("-", " ").split()
    if "nvidia" not in words:
        return "cpu"
    return next(word for word in words if word != "nvidia" and any(letter.isdigit() for letter in word))


def ceilings(results: Results, about: Mapping[str, str]) -> dict[str, Any]:
    """Rates of the square matrix product and of the copy; empty without both."""
    found = rows_of(results, "ceilings")
    products = [row["tflop_per_s"] for row in found if row["what"] == "product square"]
    copies = [row["tb_per_s"] for row in found if row["what"] == "copy"]
    if not products or not copies:
        return {}
    rates = {"tflop_per_s": max(products), "tb_per_s": max(copies)}
    return {"gpu": about["machine"], "date": about["date"]} | rates


def tuned(results: Results) -> str:
    """The configurations that beat the first ones by more than the spread, a line each."""
    table: dict[str, dict[str, list]] = {}
    for row in rows_of(results, "tuning"):
        if row.get("kept"):
            table.setdefault(row["operator"], {})[row["key"]] = row["best"]
    operators = [
        f" {json.dumps(name)}: {{\n"
        + ",\n".join(f"  {json.dumps(k)}: {json.dumps(c)}" for k, c in sizes.items())
        + "\n }"
        for name, sizes in table.items()
    ]
    return "{\n" + ",\n".join(operators) + "\n}\n"


def page(results: Results, bad: Sequence[str]) -> str:
    about = machine_of(results)
    title = f"# {about.get('machine', 'nothing measured')}, {about.get('date', '')[:10]}"
    versions = "; ".join(f"{name} {about[name]}" for name in ("torch", "triton", "python", "system") if name in about)
    lines = [title, "", f"{versions}; commit {about.get('commit', 'unknown')}; last row {about.get('date', '')}."]
    for name in ("machine", "commit", "torch", "triton"):
        found = sorted({result.about[name] for result in results.values() if name in result.about})
        if len(found) > 1:
            lines += ["", f"Rows are of more than one {name}: {'; '.join(found)}."]
    lines += ["", f"Red or missing: {len(bad)}", *(f"- {text}" for text in bad)]
    for heading, section in SECTIONS.items():
        if content := section(results):
            lines += ["", f"## {heading}", "", *content]
    return "\n".join(lines) + "\n"


def table(head: str, rows: Iterable[Sequence[Any]]) -> list[str]:
    """Markdown. head: names by "|", which are numbers and to the right where they begin with a space."""
    names = head.split("|")
    body = [f"| {' | '.join(_cell(value) for value in row)} |" for row in rows]
    rule = "|" + "|".join("--:" if name.startswith(" ") else "---" for name in names) + "|"
    return [f"| {' | '.join(name.strip() for name in names)} |", rule, *body] if body else []


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value).replace("|", "/").replace("\n", " ")


def _ceilings(results: Results) -> list[str]:
    found = [row for row in rows_of(results, "ceilings") if "absent" not in row]
    rates = [
        (r["what"], r.get("model"), r.get("direction"), r.get("ms"), r.get("tflop_per_s"), r.get("tb_per_s"))
        for r in found
        if "ms" in r
    ]
    attention = [
        (r["what"], r["model"], r["head_dim"], r["forward_tflop_per_s"], r["backward_tflop_per_s"])
        for r in found
        if "forward_ms" in r
    ]
    return [
        *table("what|model|direction| ms| TFLOP/s| TB/s", rates),
        *([""] if attention else []),
        *table("attention|model| head size| forward TFLOP/s| backward TFLOP/s", attention),
    ]


def _tests(results: Results) -> list[str]:
    counts = {
        task: row["count"] for (part, task), r in results.items() if part == "tests" for row in r.rows if "count" in row
    }
    return [
        f"- {task}: " + ", ".join(f"{n} {word.lower()}" for word, n in count.items()) for task, count in counts.items()
    ]


def _steps(results: Results) -> list[str]:
    steps = [row for row in rows_of(results, "step", "variants") if "losses" in row]
    plain = {(r["config"], r["images"], r["side"]): r["ms"] for r in rows_of(results, "step") if "losses" in r}
    against = {c.name: c for c in comparisons(results)}
    rows = []
    for r in steps:
        c = against.get(name_of(r))
        rows.append(
            (
                name_of(r), r["engine"], r["ms"], r["p20"], r["p80"], r["images_per_s"], r["tflop_per_s"],
                f"{r['share']:.1%}", r["peak_gb"], r["losses"][0], r["gradient_norms"][0],
                *((c.loss, c.norm, f"{c.gradient:.1e} {c.worst}", "RED" if c.red else "yes") if c else ("",) * 4),
            )
        )  # fmt: skip
    lines = table(
        "step|engine| ms| p20| p80| images/s| TFLOP/s| share of peak| peak GB| loss| gradient norm| loss apart"
        "| norm apart|gradient most apart|agrees", rows,
    )  # fmt: skip
    tolerated = TOLERANCES[device_of(results)]
    if rows:
        lines += [
            "", f"Agrees: loss to {tolerated.loss:g}, gradient norm to {tolerated.norm:g}, the norm of each "
            f"parameter's gradient to {tolerated.gradient:g}.",
        ]  # fmt: skip
    for (config, images, side), ms in plain.items():
        others = [name for name in ("reference", "compiled") if side == "ours" and (config, images, name) in plain]
        for other in others:
            times = plain[config, images, other] / ms
            lines.append(f"- {config}, {images} images: ours is {times:.2f} times as fast as {other}")
    return lines


def _operators(results: Results) -> list[str]:
    found = rows_of(results, "operators")
    timed = [
        (
            r["case"],
            r["pass"],
            r["provider"],
            r["body"],
            1e3 * r["p50"],
            r["gb_per_s"],
            r["tflop_per_s"],
            f"{r['share']:.0%}",
        )
        for r in found
        if "p50" in r
    ]
    absent = [f"- not there: {row['absent']}" for row in found if "absent" in row]
    return [
        *table("case|pass|provider|body| us| GB/s| TFLOP/s| share of the ceiling", timed),
        *[""][: len(absent)],
        *absent,
    ]


def _profile(results: Results) -> list[str]:
    lines = []
    for (part, task), result in results.items():
        if part == "profile" and result.rows:
            whole, *kernels = [row for row in result.rows if "red" not in row]
            lines += [
                "", f"{task}: {whole['step_ms']:.2f} ms, of which {whole['busy_ms']:.2f} ms in {whole['kernels']:.0f} "
                f"kernels; idle {whole['idle_share']:.1%}", "",
                *table("kernel| us a step| calls", [(r["kernel"], r["us"], r["calls"]) for r in kernels[:25]]),
            ]  # fmt: skip
    return lines


def _product(results: Results) -> list[str]:
    lines = []
    for r in rows_of(results, "product"):
        if "seconds" in r:
            rates = (f"{r[name]:,.0f}" for name in ("images_per_s", "p20", "p80"))
            lines.append(
                f"- {r['config']}: {r['images']:,} images in {r['seconds']:.0f} s, everything included; "
                "{} images/s ({} to {}), last loss {:.4f}".format(*rates, r["last_loss"])
            )
        elif "evaluation" in r:
            lines.append(f"- {r['config']}, evaluated: {json.dumps(r['evaluation'])}")
        elif "apart" in r:
            lines.append(
                f"- {r['config']}, resumed from image {r['resumed_from']:,}: {r['apart']} of {r['tensors']} tensors of "
                "the last checkpoint differ from those of the run without a stop"
            )
    return lines


def _counters(results: Results) -> list[str]:
    found = rows_of(results, "counters")
    names = sorted({name for row in found for name in row} - {"model", "kernel", "absent", "red"})
    rows = [[row["kernel"], *(row.get(name) for name in names)] for row in found if "kernel" in row]
    return table("|".join(["kernel", *(f" {name}" for name in names)]), rows) or [
        r["absent"] for r in found if "absent" in r
    ]


def _tuning(results: Results) -> list[str]:
    best = [
        (r["operator"], r["key"], r["best"], r["gain"], "yes" if r["kept"] else "")
        for r in rows_of(results, "tuning")
        if "best" in r
    ]
    return table("operator|sizes|fastest configuration| times faster than the first|kept", best)


def _sampling(results: Results) -> list[str]:
    rows = [
        (r["config"], r["body"], r["images"], r["steps"], r["guidance"], r["images_per_s"])
        for r in rows_of(results, "sampling")
    ]
    return table("config|body| images| steps| guidance| images/s", rows)


def _loader(results: Results) -> list[str]:
    lines = []
    for row in rows_of(results, "loader"):
        if "absent" in row:
            return [row["absent"]]
        rates = [(name, statistics.median(values)) for name, values in row["images_per_s"].items()]
        lines += table("provider| images/s", rates)
    return lines


def _predicted(results: Results) -> list[str]:
    found = [row for row in rows_of(results, "predicted") if "ratio" in row]
    lines = table(
        "model|case|launch|bound by| modelled us| measured us| ratio| TB/s| TFLOP/s",
        [
            (r["model"], r["case"], r["launch"], r["limit"], r["modelled_us"], r["measured_us"], r["ratio"],
             r["tb_per_s"], r["tflop_per_s"])
            for r in found
        ],
    )  # fmt: skip
    if found:
        ratios = [row["ratio"] for row in found]
        worst = max(found, key=lambda row: max(row["ratio"], 1 / row["ratio"]))
        lines += ["", f"Measured / modelled: median {statistics.median(ratios):.2f}, worst {worst['ratio']:.2f} "
                  f"({worst['model']} {worst['case']} {worst['launch']})."]  # fmt: skip
    return lines


SECTIONS: dict[str, Callable[[Results], list[str]]] = {
    "Ceilings": _ceilings,
    "Tests on the device": _tests,
    "Training step": _steps,
    "Operators": _operators,
    "Profile by kernel": _profile,
    "Main job": _product,
    "Counters": _counters,
    "Tuning": _tuning,
    "Sampling": _sampling,
    "Loader": _loader,
    "Predicted and measured": _predicted,
}
