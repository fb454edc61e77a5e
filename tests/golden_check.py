"""Compute published models' reference numbers again: `python tests/golden_check.py FILE.npz...`

Prints the relative error of every array and number in each file, and exits with 1 where one is above 1e-5, or where a
file cannot be rebuilt.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # run as a script, from anywhere

import rebuilt


def main(paths: list[str]) -> int:
    if not paths:
        print(__doc__)
        return 2
    return int(not all([check(Path(path)) for path in paths]))


def check(path: Path) -> bool:
    """Print the errors of a file; whether all are within the limit."""
    try:
        found = rebuilt.errors(path)
    except (ValueError, OSError, KeyError) as problem:
        print(f"{path}: {problem}")
        return False
    for name, error in found.items():
        print(f"{error:10.2e}  {path.name}  {name}{'' if error <= rebuilt.LIMIT else '   ABOVE ' + str(rebuilt.LIMIT)}")
    worst = max(found, key=found.__getitem__)
    print(f"{path.name}: {len(found)} numbers and arrays, the worst {worst} at {found[worst]:.2e}")
    return found[worst] <= rebuilt.LIMIT


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
