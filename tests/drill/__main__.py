"""What survives of what really happens: python -m tests.drill [--seed N] [--faults N] [--inputs N] [--jobs N]

Prints a table by kind and ends with 1 where something was lost or mismatched, hung, or gave a traceback. Runs that did
not survive stay in their folders, which are named.
"""

from __future__ import annotations

import argparse
import logging
import random
import sys
import tempfile
import warnings
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from hypothesis import HealthCheck, given, seed, settings
from tqdm import tqdm

from tests.drill import faults, run
from tests.drill.inputs import KINDS, Kind, verdict


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--faults", type=int, default=1000, help="in runs of real processes")
    parser.add_argument("--first", type=int, default=0, help="the fault to begin with: a drill may be divided")
    parser.add_argument("--inputs", type=int, default=20_000, help="bad ones, of all kinds together")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--only", help="faults or kinds of input by a part of their name")
    args = parser.parse_args()
    bad = inject(args.faults, args.seed, args.jobs, args.only, args.first) if args.faults else 0
    bad += feed(args.inputs, args.seed, args.only) if args.inputs else 0
    return 1 if bad else 0


def inject(count: int, seed_: int, jobs: int, only: str | None, first: int = 0) -> int:
    """Faults [first, count) of those that are drawn by their weights; returns how many were not survived.

    An interrupt ends it with the table of what was done.
    """
    place = Path(tempfile.mkdtemp(prefix="drill_"))
    plain = run.Run(place / "undisturbed")
    plain.end(plain.start(), 0)
    undisturbed = run.weights(plain)
    rng = random.Random(seed_)
    names = [name for name in faults.FAULTS if only is None or only in name]
    drawn = rng.choices(names, [faults.FAULTS[name].weight for name in names], k=count)
    table: dict[str, Counter[str]] = defaultdict(Counter)
    stories = []
    done = first
    with ThreadPoolExecutor(jobs) as pool, tqdm(total=count - first, unit="fault", mininterval=30) as bar:

        def one(number: int) -> tuple[int, str]:
            return number, faults.outcome(drawn[number], seed_ * 10**6 + number, place / str(number), undisturbed)

        try:
            for number, said in pool.map(one, range(first, count)):
                table[drawn[number]][said.split(":")[0]] += 1
                if said != "survived":
                    stories.append(f"{drawn[number]}, {place / str(number)}: {said}")
                    tqdm.write(stories[-1])
                bar.update()
                done = number + 1
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
    print(f"faults {first} to {done - 1} of seed {seed_}\n")
    print("| fault | injected | survived | lost | mismatched |\n|---|--:|--:|--:|--:|")
    total: Counter[str] = sum(table.values(), Counter())
    for name, counts in [*table.items(), ("all", total)]:
        print(f"| {name} | {counts.total()} | {counts['survived']} | {counts['lost']} | {counts['mismatched']} |")
    print(*stories, sep="\n")
    return len(stories)


def feed(count: int, seed_: int, only: str | None) -> int:
    """Bad inputs, as many of each kind; returns how many had neither a result nor a line that names the place."""
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    names = [name for name in KINDS if only is None or only in name]
    each, bad = -(-count // max(1, len(names))), 0
    print("| bad input | given | a result or a line | neither |\n|---|--:|--:|--:|")
    for name in names:
        seen, examples = verdicts(KINDS[name], each, seed_)
        wrong = seen.total() - seen[""]
        bad += wrong
        print(f"| {name} | {seen.total()} | {seen['']} | {wrong} |", flush=True)
        for said, n in seen.most_common(8):
            if said:
                print(f"  {n} x {said}\n    {examples[said]!r:.300}", flush=True)
    return bad


def verdicts(kind: Kind, count: int, seed_: int) -> tuple[Counter[str], dict[str, object]]:
    """How often each verdict was given, and an example of it."""
    seen: Counter[str] = Counter()
    examples: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as folder, tqdm(total=count, unit="input", leave=False, disable=None) as bar:

        @seed(seed_)
        @settings(max_examples=count, database=None, deadline=None, suppress_health_check=list(HealthCheck))
        @given(kind.examples)
        def use(example: object) -> None:
            said = verdict(kind, example, Path(folder) / "given")
            seen[said] += 1
            examples.setdefault(said, example)
            bar.update()

        use()
    return seen, examples


if __name__ == "__main__":
    sys.exit(main())
