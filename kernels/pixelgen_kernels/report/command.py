"""Compile every kernel for a GPU that is not there, say what it costs, and fail when it costs too much.

    python -m pixelgen_kernels.report [--all] [--gate] [--ops swiglu,pixel_mlp] [--models XL] [--ceilings FILE]

One row a launch: registers, stack and local-memory accesses, shared memory, resident warps and what limits them,
wgmma, the share of bytes moved in 128-bit accesses, special functions and issue slots per pixel or token, FLOP,
bytes, the four modelled limits, the time they give and its share of the roofline (see roofline.py for its limits).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from time import perf_counter

import torch
import triton

from pixelgen_kernels.launch import Started
from pixelgen_kernels.registry import OPERATORS, Operator
from pixelgen_kernels.report.compile import ARCHITECTURES, compile_all
from pixelgen_kernels.report.gpu import H100, Device, with_ceilings
from pixelgen_kernels.report.listing import listed
from pixelgen_kernels.report.roofline import estimate
from pixelgen_kernels.report.rules import Row, broken_rules, gate, read_baseline, write_baseline
from pixelgen_kernels.shapes import MODELS, ModelShape

BASELINE = Path(__file__).resolve().parents[3] / "benchmarks" / "results" / "kernels_baseline.json"


def note(device: Device) -> str:
    """What the times are, for a reader of the table."""
    return (
        f"Modelled for {device.name}, not measured: ceilings {device.tensor_rate / 1e12:.0f} TFLOP/s, "
        f"{device.bandwidth / 1e12:.1f} TB/s ({device.ceilings}), {device.sms * device.issue_per_clock} issue slots a "
        f"clock at {device.clock / 1e9:.3f} GHz; +-30 %, no latency. 64 images, bf16."
    )


def rows(
    operators: Mapping[str, Operator],
    shapes: Iterable[ModelShape],
    *,
    every: bool = False,
    arch: int = 90,
    jobs: int = 2,
    device: Device = H100,
    verbose: bool = False,
) -> list[Row]:
    """Compile and model the launches of operators at model sizes. every: all tuning configurations."""
    planned = listed(operators, shapes, every, ARCHITECTURES[arch])

    def tell(started: Started, seconds: float) -> None:
        if verbose:
            print(f"compiled {started.launch.name} {seconds:.1f} s", file=sys.stderr)

    answers = compile_all([item.started for item in planned], arch, jobs, tell)
    return [
        Row(**vars(item), compiled=c, estimate=estimate(item.launch, c, device) if c.profile else None, arch=arch)
        for item, c in zip(planned, answers, strict=True)
    ]


HEAD = (
    "case: launch", "model", "regs", "stack", "local", "shared KB", "warps/SM", "limited by", "wgmma", "128-bit",
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
    name = f"{row.case}: {launch.name}" + ("" if row.shipped else f" {row.config}")
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
        entry = {k: getattr(row, k) for k in ("operator", "model", "case", "config", "shipped", "key")}
        entry |= {"launch": launch, "compiled": asdict(row.compiled), "modelled": model}
        out.append(entry | {"broken": broken_rules(row)})
    return out


def main(
    argv: Sequence[str] | None = None,
    operators: Mapping[str, Operator] = OPERATORS,
    models: Mapping[str, ModelShape] = MODELS,
) -> int:
    """Run the command line; 0 when all is well, 1 when the gate found a broken rule."""
    args = _parser(operators, models).parse_args(argv)
    start = perf_counter()
    device = H100 if args.ceilings is None else with_ceilings(H100, args.ceilings)
    if args.ceilings is not None and (args.gate or args.update_baseline):
        raise ValueError("--ceilings changes the times, which --gate and --update-baseline keep at the report's own")
    chosen = {name: op for name, op in operators.items() if name in args.ops}
    found = rows(
        chosen, [models[name] for name in args.models], every=args.all, arch=args.arch, jobs=args.jobs,
        device=device, verbose=args.verbose,
    )  # fmt: skip
    seconds = perf_counter() - start
    title = f"Kernels for sm_{args.arch} ({ARCHITECTURES[args.arch]}), Triton {triton.__version__}"
    about = note(device) if args.arch == 90 else "Compiled to see that all compiles and fits; times are those of sm_90."
    text = f"{title}\n\n{about}\n\n{table(found)}\n"
    print(text)
    print(f"{len(found)} launches in {seconds:.1f} s", file=sys.stderr)
    if args.markdown:
        args.markdown.write_text(f"# {text}")
    if args.json:
        versions = {"arch": args.arch, "device": H100.name, "triton": triton.__version__, "torch": torch.__version__}
        args.json.write_text(json.dumps(versions | {"note": about, "rows": as_json(found)}, indent=1) + "\n")

    whole = set(chosen) == set(operators) and set(args.models) == set(models)
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


def _parser(operators: Mapping[str, Operator], models: Mapping[str, ModelShape]) -> argparse.ArgumentParser:
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
    parser.add_argument("--models", type=names(list(models)), default=list(models), help="models, by comma")
    parser.add_argument("--arch", type=int, choices=sorted(ARCHITECTURES), default=90, help="80, 90 or 100")
    parser.add_argument("--jobs", type=int, default=2, help="processes that compile")
    parser.add_argument("--ceilings", type=Path, metavar="FILE", help="measured ones: tflop_per_s, tb_per_s (JSON)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    parser.add_argument("--baseline", type=Path, default=BASELINE, metavar="FILE", help="modelled times to hold")
    parser.add_argument("--update-baseline", action="store_true", help="accept the modelled times of this run")
    parser.add_argument("--verbose", action="store_true", help="name each kernel as it is compiled")
    return parser
