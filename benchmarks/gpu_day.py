"""Everything that one short visit to a GPU should bring home, in parts that each end in time.

    python benchmarks/gpu_day.py [--parts ceilings,tests,...] [--limit 540] [--out DIR] [--rehearse] [--prepare]

Parts, the most important first: ceilings, tests, step (ours, reference, compiled; do they agree?), profile, product
(the main job, and its resuming bit for bit), variants (recomputation, micro-batches, CUDA graph), operators, counters,
tuning, sampling, loader, predicted (against measured). Each measurement is a process of its own with a time limit
(gpu/). Rows go to DIR/day.jsonl as they are made, output to DIR/day.log; last come DIR/day.md, ceilings.json for
`pixelgen kernels report --ceilings`, and tuned/<gpu>.json for kernels/pixelgen_kernels/tuned. The same --out again
measures only what is not there or did not end well. The exit code is 1 when something is red or missing.

--rehearse goes the same way on a CPU at tiny sizes, kernels in Triton's interpreter. --prepare, where there is a
network, collects in .gpu/ what a machine without one may lack; a visit finds it there. So on a machine with a GPU and
no network, in a copy of this folder with .gpu/ in it, for a command of ten minutes with results in $OUT:

    python3 benchmarks/gpu_day.py --limit 540 --out "$OUT"

and to go on from what an earlier visit has brought home, put into .gpu/ as well:

    cp .gpu/day.jsonl "$OUT" && python3 benchmarks/gpu_day.py --limit 300 --out "$OUT"
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from pathlib import Path

from gpu import plan, summary, wheels
from gpu.visit import Visit, read
from machine import CARRIED, COMMIT

GPU = Path("/dev/nvidiactl")


def main() -> int:
    args = _parser().parse_args()
    if args.prepare:
        wheels.collect()
        return 0
    if not args.rehearse and not GPU.exists():
        raise SystemExit(f"error: there is no GPU here ({GPU} is missing); --rehearse goes the same way without one")
    if not args.rehearse and CARRIED.exists():  # the copy's own history may end before what was copied
        os.environ[COMMIT] = CARRIED.read_text().strip()
    known = {part.name: part for part in plan.parts(args.rehearse)}
    names = args.parts.split(",") if args.parts else list(known)
    if unknown := [name for name in names if name not in known]:
        raise SystemExit(f"error: --parts {','.join(unknown)}: use some of {', '.join(known)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # so that no child outlives this process
    start = time.monotonic()
    visit = Visit([known[name] for name in names], args.out, args.limit, wheels.unpacked())
    try:
        visit.run(again=summary.disagreeing(read(visit.rows)))
    finally:
        bad = summary.write(args.out, read(visit.rows), visit.missing())
    print((args.out / "day.md").read_text())
    print(f"{time.monotonic() - start:.0f} s; {len(bad)} red or missing" + "".join(f"\n- {text}" for text in bad))
    return 1 if bad else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--parts", help="by comma; all by default")
    parser.add_argument("--limit", type=float, default=540, help="seconds for all parts together")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu_day"), help="where rows are kept and looked for")
    parser.add_argument("--rehearse", action="store_true", help="the same way on a CPU, at tiny sizes")
    parser.add_argument("--prepare", action="store_true", help="collect in .gpu/ what the machine may lack")
    return parser


if __name__ == "__main__":
    sys.exit(main())
