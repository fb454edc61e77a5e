"""A visit: measurements one after another, each in a process of its own with a time limit, rows kept as they are made.

Rows are lines of JSON in one file, each with its part and task. A task begins with {"begin": number of the attempt},
says where it is measured ({"about": machine, versions, commit}) and ends with {"end": how}: "ok", "red", "no rows",
"timed out after 60 s", "exit 1" or "killed by SIGSEGV". What ended in "ok" is not measured again; the rest is, and what
it left before no longer counts.

While one task measures, the processes of the next ones import, compile and wait, so that the device waits for nobody.
A part begins tasks until all parts up to it have used their share of the visit; what an earlier one leaves, later ones
get. No task runs longer than its limit, or past the end of the visit.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SHORTEST = 5.0  # seconds: with less left of its part, a task is not begun
TAIL = 1500  # characters of its output that a failed task leaves in its last row


@dataclass(frozen=True)
class Task:
    """One measurement. module: whose `measure` gets the arguments. limit: seconds on the device."""

    name: str
    module: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    limit: float = 60.0
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Part:
    """Tasks of one kind, the most important first. seconds: share of the visit. ahead: processes that prepare."""

    name: str
    seconds: float
    tasks: tuple[Task, ...]
    ahead: int = 1


Key = tuple[str, str]


@dataclass
class Result:
    """What the rows say of one task. end: empty while it has none."""

    attempt: int = 0
    about: dict[str, str] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    end: str = ""
    tail: str = ""

    @property
    def reds(self) -> list[str]:
        return [row["red"] for row in self.rows if "red" in row]


def read(path: Path) -> dict[Key, Result]:
    """Results by (part, task), in the order of their beginning. A line that a killed process left half is skipped."""
    found: dict[Key, Result] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        key = row.pop("part"), row.pop("task")
        if "begin" in row:
            found[key] = Result(row["begin"])
        elif "about" in row:
            found[key].about = row["about"]
        elif "end" in row:
            found[key].end, found[key].tail = row["end"], row.get("tail", "")
        else:
            found[key].rows.append(row)
    return found


def append(path: Path, row: Mapping[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


class Child:
    """The process of a task, from its start on; it waits for `measure`."""

    def __init__(self, part: Part, task: Task, rows: Path, path: Sequence[str], logs: Path) -> None:
        self.part, self.task, self.rows = part, task, rows
        paths = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks"), *path, os.environ.get("PYTHONPATH", "")]
        environment = {"PYTHONPATH": os.pathsep.join(p for p in paths if p), "PYTHONUNBUFFERED": "1"}
        spec = {"part": part.name, "task": task.name, "rows": str(rows), "module": task.module}
        self.log = logs / f"{part.name} {task.name}.log"
        with self.log.open("w") as stream:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "gpu.child", json.dumps(spec | {"arguments": dict(task.arguments)})],
                stdin=subprocess.PIPE, stdout=stream, stderr=subprocess.STDOUT, text=True, cwd=ROOT,
                env=os.environ | environment | dict(task.environment), process_group=0,
            )  # fmt: skip

    def measure(self, limit: float) -> str:
        """Give it the device; how it ended."""
        with suppress(BrokenPipeError):  # it has failed already, and its exit code says so
            self.process.stdin.write("go\n")
            self.process.stdin.flush()
        try:
            code = self.process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            self.stop()
            return f"timed out after {limit:.0f} s"
        self.stop()  # what it started and did not end
        if code:
            return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit {code}"
        result = read(self.rows)[self.part.name, self.task.name]
        return "red" if result.reds else "ok" if result.rows else "no rows"

    def stop(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        with suppress(BrokenPipeError):
            self.process.stdin.close()

    def output(self) -> str:
        return self.log.read_text(errors="replace")


class Visit:
    """out/day.jsonl and out/day.log of the parts given. path: more places to import from."""

    def __init__(self, parts: Sequence[Part], out: Path, limit: float, path: Sequence[str] = ()) -> None:
        self.parts, self.limit, self.path = parts, limit, path
        out.mkdir(parents=True, exist_ok=True)
        out = out.resolve()  # a measurement runs elsewhere
        self.rows, self.log = out / "day.jsonl", out / "day.log"
        if self.rows.exists() and not self.rows.read_text().endswith("\n"):
            with self.rows.open("a") as file:  # the end of a line that a killed process left half
                file.write("\n")
        self.start = time.monotonic()

    def run(self, again: Collection[Key] = ()) -> None:
        """Measure what is not there yet, until the time is over. again: what does not count as being there."""
        done = {key for key, result in read(self.rows).items() if result.end == "ok"}.difference(again)
        queue = deque((p, t) for p in self.parts for t in p.tasks if (p.name, t.name) not in done)
        with tempfile.TemporaryDirectory() as logs, self._children() as waiting:
            place = (self.rows, self.path, Path(logs))
            while queue:
                part, task = queue[0]
                now = time.monotonic()
                if self._deadline(part) - now < SHORTEST:
                    print(f"{part.name}: no time left for {task.name}", flush=True)
                    queue.popleft()
                    if waiting and waiting[0].task is task:
                        waiting.popleft().stop()
                    continue
                child = waiting.popleft() if waiting else Child(part, task, *place)
                queue.popleft()
                ahead = [*queue][: queue[0][0].ahead] if queue else []
                waiting += [Child(*following, *place) for following in ahead[len(waiting) :]]
                self._measure(child, min(task.limit, self.start + self.limit - now))

    def missing(self) -> list[str]:
        """Tasks of the parts that did not end well, with how they ended."""
        found = read(self.rows)
        ends = {f"{p.name} {t.name}": found.get((p.name, t.name), Result()).end for p in self.parts for t in p.tasks}
        return [f"{name}: {end or 'not measured'}" for name, end in ends.items() if end != "ok"]

    def _deadline(self, part: Part) -> float:
        shares = [p.seconds for p in self.parts]
        return self.start + self.limit * sum(shares[: self.parts.index(part) + 1]) / sum(shares)

    @contextmanager
    def _children(self) -> Iterator[deque[Child]]:
        waiting: deque[Child] = deque()
        try:
            yield waiting
        finally:
            for child in waiting:
                child.stop()

    def _measure(self, child: Child, limit: float) -> None:
        name = f"{child.part.name} {child.task.name}"
        key, begin = (child.part.name, child.task.name), time.monotonic()
        attempt = read(self.rows).get(key, Result()).attempt + 1
        append(self.rows, {"part": key[0], "task": key[1], "begin": attempt})
        try:
            end = child.measure(limit)
        finally:
            child.stop()
        seconds, text = time.monotonic() - begin, child.output()
        row = {"part": key[0], "task": key[1], "end": end, "seconds": round(seconds, 1)}
        append(self.rows, row | ({} if end in ("ok", "red") else {"tail": text.strip()[-TAIL:]}))
        with self.log.open("a") as log:
            log.write(f"=== {name}: {end}, {seconds:.0f} s\n{text}\n")
        result = read(self.rows)[key]
        print(f"{name}: {len(result.rows)} rows, {end}, {seconds:.0f} s", flush=True)
        for red in result.reds[:20]:
            print(f"  RED {red}", flush=True)
        if end not in ("ok", "red"):
            print("  " + "\n  ".join(text.strip()[-TAIL:].splitlines()[-6:]), flush=True)
