"""`pixelgen evaluate --sweep KEY=A,B KEY=C,D`: one set of images for each combination of settings.

    guidance=1,1.5,2   interval=none,0.1:0.9   steps=25,50   solver=heun,adams2   weights=ema,raw

A point is in the JSON file as soon as it is measured, so the same command goes on with the next one, and a longer sweep
takes over the points that it shares with an earlier one. At the end there are a table and a picture (picture.py).
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_args

from pixelgen_fast import config as cfg
from pixelgen_fast.engine.team import Team
from pixelgen_fast.errors import InputError
from pixelgen_fast.measure import picture
from pixelgen_fast.measure.evaluate import Request, choose_judge, identity, measure, settings_of, write_json
from pixelgen_fast.measure.judges import Judge
from pixelgen_fast.measure.picture import value_text
from pixelgen_fast.runs import draw
from pixelgen_fast.runs.draw import Generator
from pixelgen_fast.runs.folder import RunFolder
from pixelgen_fast.settings import Solver

Point = dict[str, Any]
WEIGHTS = "weights"


def _interval(text: str) -> tuple[float, float] | None:
    low, colon, high = text.partition(":")
    if not colon and text != "none":
        raise ValueError(text)
    return None if text == "none" else (float(low), float(high))


def _solver(text: str) -> str:
    if text not in get_args(Solver):
        raise ValueError(text)
    return text


# how a value is read, and what it looks like
KINDS: dict[str, tuple[Callable[[str], Any], str]] = {
    WEIGHTS: (str, "a name such as ema or raw"),
    "guidance": (float, "a number"),
    "interval": (_interval, "LOW:HIGH, or none"),
    "steps": (int, "a whole number"),
    "solver": (_solver, " or ".join(get_args(Solver))),
    "shift": (float, "a number"),
    "temperature": (float, "a number"),
    "passes": (int, "a whole number"),
    "end": (float, "a number"),
    "seed": (int, "a whole number"),
}


def parse(texts: Sequence[str]) -> dict[str, list[Any]]:
    """{key: values} of KEY=A,B texts. Raises InputError, naming it, for one that cannot be meant."""
    if not texts:
        raise InputError(f"--sweep names nothing: write KEY=A,B,..., where KEY is one of {', '.join(KINDS)}")
    axes: dict[str, list[Any]] = {}
    for text in texts:
        key, equals, values = text.partition("=")
        if not equals or key not in KINDS:
            raise InputError(f"--sweep {text}: write KEY=A,B,..., where KEY is one of {', '.join(KINDS)}")
        if key in axes:
            raise InputError(f"--sweep {text}: {key} is swept already; give all its values at once")
        axes[key] = [_value(text, key, value) for value in values.split(",")]
        if len({*axes[key]}) < len(axes[key]):
            raise InputError(f"--sweep {text}: a value comes twice")
    return axes


def _value(text: str, key: str, value: str) -> Any:
    read, looks = KINDS[key]
    try:
        found = read(value)
    except ValueError as error:
        raise InputError(f"--sweep {text}: {value!r} is no value of {key}, which is {looks}") from error
    if not value:
        raise InputError(f"--sweep {text}: a value of {key} is empty")
    if key in {f.name for f in fields(cfg.Sampling)}:
        cfg.check_sampling(cfg.Sampling(**{key: found}), f"--sweep {text}: ")
    return found


def points(axes: Mapping[str, Sequence[Any]]) -> list[Point]:
    """Every combination, those of one model's weights together."""
    keys = sorted(axes, key=lambda key: key != WEIGHTS)
    combinations = itertools.product(*(axes[key] for key in keys))
    return [{key: dict(zip(keys, values, strict=True))[key] for key in axes} for values in combinations]


def sweep(request: Request, axes: dict[str, list[Any]], team: Team) -> None:
    """Measure what is not there yet; rank 0 writes, draws and prints. All ranks call it.

    Raises InputError for a key that the command fixes, and what `measure` raises.
    """
    if fixed := [key for key in axes if key in request.changes or (key == WEIGHTS and request.weights)]:
        raise InputError(f"--{fixed[0]} is given and swept as well; leave one of them out")
    Sweep(request, axes, team).run()


class Sweep:
    """One sweep. file: where its points are. earlier: those that an earlier command has left there."""

    def __init__(self, request: Request, axes: dict[str, list[Any]], team: Team) -> None:
        self.request, self.axes, self.team = request, axes, team
        self.file = request.out or RunFolder(request.folder).sweep
        self.earlier = team.first(lambda: read(self.file))
        self.found: list[dict[str, Any]] = []
        self.loaded: tuple[str | None, Generator] | None = None
        self.judge: Judge | None = None

    def run(self) -> None:
        wanted = points(self.axes)
        for weights in reversed(self.axes.get(WEIGHTS, [])):  # one that is not there is named before hours of drawing
            self._model(weights)
        for number, point in enumerate(wanted, start=1):
            entry = self._entry(point)
            if entry is not None:  # on rank 0
                self.found.append(entry | {"point": json.loads(json.dumps(point))})
                self._write()
                print(f"{number} of {len(wanted)}: {label(point)}: {figures_text(entry['figures'])}")
        if self.found:
            self._finish()

    def _model(self, weights: str | None) -> Generator:
        if self.loaded is None or self.loaded[0] != weights:
            self.loaded = weights, draw.load(self.request.run, weights, self.request.device)
        return self.loaded[1]

    def _entry(self, point: Point) -> dict[str, Any] | None:
        """What is measured of a point, now or by an earlier command, on rank 0; None on the others."""
        weights = point.get(WEIGHTS, self.request.weights)
        changes = self.request.changes | {key: value for key, value in point.items() if key != WEIGHTS}
        one = replace(self.request, weights=weights, changes=changes)
        loaded = self._model(weights)
        self.judge = judge = self.judge or choose_judge(loaded, one, self.team)
        settings = settings_of(loaded, changes)
        del settings["batch"]
        known = identity(loaded, settings, one, judge, one.samples or judge.count) | {"against": judge.against}
        there = self.team.first(lambda: next((e for e in self.earlier if e["identity"] == known), None))
        if there is not None:
            return there if self.team.rank == 0 else None
        measured = measure(loaded, one, judge, self.team)
        if measured is None:
            return None
        return {"identity": known, **measured.as_dict(), "figures": measured.report.figures()}

    def _write(self) -> None:
        measured = [entry["identity"] for entry in self.found]
        rest = [entry for entry in self.earlier if entry["identity"] not in measured]
        write_json(self.file, {"sweep": self.axes, "points": self.found, "earlier": rest})

    def _finish(self) -> None:
        """The table, what its numbers are of, and the picture."""
        one = self.found[0]
        print("\n".join(table(self.found)))
        print(f"each of {one['images']['labels']}; {one['images']['rounding']}")
        if "against" in one["report"]:
            print("\n".join([f"against {one['report']['against']}", *one["report"]["left_out"]]))
        image = picture.draw(self.file.with_suffix(".png"), self.axes, self.found)
        print(f"{self.file}, {image}")


def read(file: Path) -> list[dict[str, Any]]:
    """The points that an earlier sweep has measured. Raises InputError for a file of something else."""
    if not file.is_file():
        return []
    try:
        found = json.loads(file.read_text())
        entries = [*found["points"], *found["earlier"]]
        return [entry for entry in entries if entry["identity"] and entry["figures"]]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file} is not what an earlier sweep wrote; move it, or name another file: --out") from error


def label(point: Point) -> str:
    """A point in words."""
    return ", ".join(f"{key} {value_text(value)}" for key, value in point.items())


def figures_text(figures: Mapping[str, float | None]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in figures.items() if value is not None)


def table(found: Sequence[dict[str, Any]]) -> list[str]:
    """A line a point, the one with the lowest first figure marked."""
    names = [name for name in found[0]["figures"] if any(e["figures"].get(name) is not None for e in found)]
    best = min(found, key=lambda entry: entry["figures"][names[0]])
    rows = [[*found[0]["point"], *names]]
    for entry in found:
        values = [entry["figures"].get(name) for name in names]
        shown = ["" if value is None else f"{value:.4g}" for value in values]
        rows.append([*map(value_text, entry["point"].values()), *shown])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True)) for row in rows]
    marks = ["", *(f"  lowest {names[0]}" if entry is best else "" for entry in found)]
    return [line + mark for line, mark in zip(lines, marks, strict=True)]
