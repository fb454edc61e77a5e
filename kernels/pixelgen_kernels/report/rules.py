"""The rules that a shipped configuration must keep, and the baseline that its modelled time is held against.

A rule that is broken is one line that names model, case, launch, the rule and the number. The baseline is a JSON file
of modelled microseconds by "model/case/launch" and by limit, so that times at other ceilings can be told from it;
`--update-baseline` writes it, a commit accepts it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pixelgen_kernels.report.compile import Compiled
from pixelgen_kernels.report.gpu import SHARED_PER_BLOCK
from pixelgen_kernels.report.listing import Listed
from pixelgen_kernels.report.roofline import LIMITS, Estimate

GROWTH = 1.10
WIDE_SHARE = 0.90  # of the bytes of a kernel: per-row statistics and partial sums may be narrower than its streams
ACCOUNTED = 0.95  # instructions must account for this share of the declared bytes and FLOPs


@dataclass(frozen=True)
class Row(Listed):
    """A listed launch, compiled and modelled; estimate is None unless for sm_90."""

    compiled: Compiled
    estimate: Estimate | None
    arch: int = 90


Baseline = Mapping[str, Mapping[str, float]]


def broken_rules(row: Row) -> list[str]:
    """What is wrong with a row, one sentence each; the times are left to `broken_times`.

    Other architectures than 90 must compile and fit; how fast they are is not judged.
    """
    launch, compiled, estimate = row.launch, row.compiled, row.estimate
    if compiled.error:
        lines = compiled.error.strip().splitlines()
        return [f"does not compile: {lines[0]} {lines[-1] if len(lines) > 1 else ''}".rstrip()]
    rules, shared = [], SHARED_PER_BLOCK[row.arch]
    if compiled.shared > shared:
        rules.append(f"needs {compiled.shared} bytes of shared memory, over the {shared} of a block on sm_{row.arch}")
    profile = compiled.profile
    if profile is None or estimate is None:
        return rules
    if compiled.stack:
        rules.append(f"uses {compiled.stack} bytes of stack per thread")
    if profile.local:
        rules.append(f"spills: {profile.local} accesses of local memory a warp")
    if estimate.occupancy.blocks == 0:
        rules.append(f"does not fit on a multiprocessor: limited by {estimate.occupancy.limit}")
    if launch.flops and not profile.wgmma:
        rules.append("has a matrix product but no wgmma instruction")
    if profile.share_at_least(launch.widest) < WIDE_SHARE:
        rules.append(
            f"moves {profile.share_at_least(launch.widest):.0%} of its bytes in accesses of {launch.widest} bits, "
            f"under {WIDE_SHARE:.0%}"
        )
    if profile.atomic_adds:
        rules.append("adds with atomics, so its result is not repeatable")
    if profile.undeclared:
        rules.append(f"has {profile.undeclared} loops whose trip counts its launch does not declare")
    if estimate.accessed < ACCOUNTED * launch.bytes_moved and not profile.bulk:
        rules.append(
            f"touches {estimate.accessed / 1e6:.1f} MB but declares {launch.bytes_moved / 1e6:.1f} MB: "
            "its trip counts or its bytes are wrong"
        )
    if estimate.executed_flops < ACCOUNTED * launch.flops:
        rules.append(
            f"executes {estimate.executed_flops / 1e9:.2f} GFLOP on the tensor cores but declares "
            f"{launch.flops / 1e9:.2f}: its trip counts or its FLOPs are wrong"
        )
    return rules


def broken_times(rows: Iterable[Row], baseline: Baseline, whole: bool) -> list[str]:
    """Rows that grew against the baseline or are missing there; whole: also the reverse."""
    broken, seen = [], set()
    for row in rows:
        if row.estimate is None:
            continue
        seen.add(row.key)
        if row.key not in baseline:
            broken.append(f"{row.key}: has no row in the baseline; accept it with --update-baseline")
            continue
        now, then = row.estimate.time * 1e6, max(baseline[row.key].values())
        if now > GROWTH * then:
            broken.append(f"{row.key}: modelled time grew from {then:.1f} to {now:.1f} us ({now / then - 1:+.0%})")
    if whole:
        broken += [f"{key}: is in the baseline but no longer exists" for key in sorted(set(baseline) - seen)]
    return broken


def gate(rows: Iterable[Row], baseline: Baseline, whole: bool) -> list[str]:
    """Every broken rule of the shipped rows; an empty list passes."""
    shipped = [row for row in rows if row.shipped]
    broken = [f"{row.key}: {rule}" for row in shipped for rule in broken_rules(row)]
    return broken + broken_times(shipped, baseline, whole)


def read_baseline(path: Path) -> Baseline:
    """Modelled microseconds by key and limit. Raises ValueError when there is no such file or it is not a baseline."""
    if not path.exists():
        raise ValueError(f"no baseline at {path}; write one with --update-baseline or name one with --baseline")
    times = json.loads(path.read_text()).get("microseconds")
    if not isinstance(times, dict) or not all(isinstance(x, dict) and x.keys() == set(LIMITS) for x in times.values()):
        raise ValueError(f"{path} is not a baseline of this report: it has no 'microseconds' by {', '.join(LIMITS)}")
    return times


def write_baseline(path: Path, rows: Iterable[Row], keep: Baseline, about: Mapping[str, str]) -> None:
    """Write the modelled times of the shipped rows over those in `keep`. about: versions, for the reader."""
    times = dict(keep)
    for row in rows:
        if row.shipped and row.estimate:
            times[row.key] = {name: round(1e6 * seconds, 3) for name, seconds in row.estimate.limits.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    head = [f" {json.dumps(key)}: {json.dumps(value)}," for key, value in about.items()]
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in sorted(times.items())]
    path.write_text("\n".join(["{", *head, ' "microseconds": {', ",\n".join(lines), " }", "}"]) + "\n")
