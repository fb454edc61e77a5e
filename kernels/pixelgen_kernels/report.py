"""Compile every kernel for a GPU that is not there, say what it costs, and fail when it costs too much.

    python -m pixelgen_kernels.report [--all] [--gate] [--ops swiglu,pixel_mlp] [--models XL] [--arch 90]

One row a launch: registers, stack and local-memory accesses, shared memory, resident warps and what limits them,
wgmma, the share of bytes moved in 128-bit accesses, special functions and issue slots per pixel or token, FLOP,
bytes, the four modelled limits, the time they give and its share of the roofline (see roofline.py for its limits).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from time import perf_counter

import torch
import triton

from pixelgen_kernels import aot
from pixelgen_kernels.device import H100
from pixelgen_kernels.gate import Row, broken_rules, gate, read_baseline, write_baseline
from pixelgen_kernels.launch import MODELS, Launch
from pixelgen_kernels.registry import OPERATORS, Operator
from pixelgen_kernels.roofline import estimate

BASELINE = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "kernels_baseline.json"
NOTE = (
    f"Modelled for {H100.name}, not measured: ceilings {H100.tensor_rate / 1e12:.0f} TFLOP/s, "
    f"{H100.bandwidth / 1e12:.1f} TB/s, {H100.sms * H100.issue_per_clock} issue slots a clock at "
    f"{H100.clock / 1e9:.3f} GHz; +-30 %, no latency. 64 images, bf16."
)


def rows(
    operators: Mapping[str, Operator], models: Sequence[str], every: bool, arch: int, jobs: int, verbose: bool = False
) -> list[Row]:
    """Compile and model the launches of operators at the named model sizes. every: all tuning configurations."""
    planned: list[tuple[str, str, str, bool, Launch]] = []
    for operator in operators.values():
        for model in models:
            for i, config in enumerate(operator.configs if every else operator.configs[:1]):
                for launch in operator.every_launch(MODELS[model], config):
                    planned.append((operator.name, model, str(config), i == 0, launch))

    def tell(launch: Launch, seconds: float) -> None:
        if verbose:
            print(f"compiled {launch.name} {seconds:.1f} s", file=sys.stderr)

    answers = aot.compile_all([p[-1] for p in planned], arch, jobs, tell)
    return [
        Row(*p, compiled, estimate(p[-1], compiled, H100) if compiled.profile else None, arch)
        for p, compiled in zip(planned, answers, strict=True)
    ]


HEAD = (
    "launch", "model", "regs", "stack", "local", "shared KB", "warps/SM", "limited by", "wgmma", "128-bit",
    "MUFU/row", "slots/row", "GFLOP", "MB", "tensor us", "memory us", "issue us", "special us", "time us",
    "bound by", "roofline",
)  # fmt: skip


SHORT = (0, 1, 2, 3, 5)  # the columns that other architectures than 90 fill


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    lines = [HEAD, ["---", "---", *["--:"] * (len(HEAD) - 2)], *(_cells(row) for row in rows)]
    if rows and all(row.arch != 90 for row in rows):
        lines = [[line[i] for i in SHORT] for line in lines]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in lines)


def _cells(row: Row) -> list[str]:
    launch, c, e = row.launch, row.compiled, row.estimate
    name = launch.name if row.shipped else f"{launch.name} {row.config}"
    if c.error:
        return [name, row.model, "does not compile", *[""] * 18]
    start = [name, row.model, str(c.registers), str(c.stack)]
    if e is None:
        return [*start, "", f"{c.shared / 1024:.1f}", *[""] * 15]
    resident = e.occupancy.blocks * launch.num_warps
    return [
        *start, str(c.profile.local), f"{c.shared / 1024:.1f}", str(resident), e.occupancy.limit, str(c.profile.wgmma),
        f"{c.profile.share_at_least(128):.0%}", f"{e.special_per_row:.1f}", f"{e.slots_per_row:.1f}",
        f"{launch.flops / 1e9:.1f}", f"{launch.bytes_moved / 1e6:.1f}",
        *(f"{1e6 * t:.1f}" for t in (e.tensor, e.memory, e.issue, e.special, e.time)), e.limit, f"{e.share:.0%}",
    ]  # fmt: skip


def as_json(rows: Sequence[Row]) -> list[dict[str, object]]:
    """The rows as plain data."""
    out = []
    for row in rows:
        launch = {k: getattr(row.launch, k) for k in ("name", "direction", "num_warps", "num_stages", "grid", "flops")}
        launch |= {"bytes": row.launch.bytes_moved, "rows": row.launch.rows, "widest": row.launch.widest}
        model = None
        if e := row.estimate:
            model = asdict(e) | {"time": e.time, "limit": e.limit, "share": e.share}
        entry = {"operator": row.operator, "model": row.model, "config": row.config, "shipped": row.shipped}
        entry |= {"launch": launch, "compiled": asdict(row.compiled), "modelled": model}
        out.append(entry | {"broken": broken_rules(row)})
    return out


def main(argv: Sequence[str] | None = None, operators: Mapping[str, Operator] = OPERATORS) -> int:
    """Run the command line; 0 when all is well, 1 when the gate found a broken rule."""
    known = {name: op for name, op in operators.items() if op.configs}
    args = _parser(known).parse_args(argv)
    start = perf_counter()
    chosen = {name: op for name, op in known.items() if name in args.ops}
    found = rows(chosen, args.models, args.all, args.arch, args.jobs, args.verbose)
    seconds = perf_counter() - start
    title = f"Kernels for sm_{args.arch} ({aot.ARCHITECTURES[args.arch]}), Triton {triton.__version__}"
    note = NOTE if args.arch == 90 else "Compiled to see that it compiles and fits; times are modelled for sm_90 only."
    text = f"{title}\n\n{note}\n\n{table(found)}\n"
    print(text)
    print(f"{len(found)} launches in {seconds:.1f} s", file=sys.stderr)
    if args.markdown:
        args.markdown.write_text(f"# {text}")
    if args.json:
        about = {"arch": args.arch, "device": H100.name, "triton": triton.__version__, "torch": torch.__version__}
        args.json.write_text(json.dumps(about | {"note": NOTE, "rows": as_json(found)}, indent=1) + "\n")

    whole = set(chosen) == set(known) and set(args.models) == set(MODELS)
    if args.update_baseline:
        keep = read_baseline(args.baseline) if args.baseline.exists() and not whole else {}
        write_baseline(args.baseline, found, keep, {"device": H100.name, "triton": triton.__version__})
        print(f"wrote {args.baseline}", file=sys.stderr)
    if not args.gate:
        return 0
    broken = gate(found, read_baseline(args.baseline) if args.arch == 90 else {}, whole and args.arch == 90)
    for line in broken:
        print(f"GATE {line}", file=sys.stderr)
    print(f"gate: {len(broken)} broken rules in {len(found)} launches", file=sys.stderr)
    return 1 if broken else 0


def _parser(operators: Mapping[str, Operator]) -> argparse.ArgumentParser:
    def names(allowed: Sequence[str]):
        def split(text: str) -> list[str]:
            given = text.split(",")
            if unknown := [name for name in given if name not in allowed]:
                raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: use some of {', '.join(allowed)}")
            return given

        return split

    parser = argparse.ArgumentParser("pixelgen_kernels.report", description=__doc__.split("\n\n")[0])
    parser.add_argument("--all", action="store_true", help="every tuning configuration, not the shipped ones only")
    parser.add_argument("--gate", action="store_true", help="exit with 1 when a shipped configuration breaks a rule")
    parser.add_argument("--ops", type=names(list(operators)), default=list(operators), help="operators, by comma")
    parser.add_argument("--models", type=names(list(MODELS)), default=list(MODELS), help="B,L,XL")
    parser.add_argument("--arch", type=int, choices=sorted(aot.ARCHITECTURES), default=90, help="80, 90 or 100")
    parser.add_argument("--jobs", type=int, default=2, help="processes that compile")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    parser.add_argument("--baseline", type=Path, default=BASELINE, metavar="FILE", help="modelled times to hold")
    parser.add_argument("--update-baseline", action="store_true", help="accept the modelled times of this run")
    parser.add_argument("--verbose", action="store_true", help="name each kernel as it is compiled")
    return parser


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, aot.ToolError) as error:
        sys.exit(f"error: {error}")
