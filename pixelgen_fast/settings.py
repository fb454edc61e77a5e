"""How a setting is written: once, with its type, default, range and meaning, in a dataclass.

    lr: float = above(0, default=1e-4)          a range beside the default; a comment says what the setting means
    crop: Crop = "adm"                          a choice is a Literal, which the code that is chosen imports from here

`check_ranges` holds a tree of such dataclasses to its ranges. Rules between settings stay code (config.validate).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from typing import Any, Literal

from pixelgen_fast.errors import InputError

Prediction = Literal["v", "x", "e"]
TimeKind = Literal["logit_normal", "uniform"]
Crop = Literal["adm", "none"]
Recompute = Literal["none", "operators", "blocks"]
Solver = Literal["euler", "heun", "adams2"]
PathKind = Literal["linear", "energy_guided"]
Device = Literal["auto", "cpu", "cuda"]
MuonScale = Literal["match_rms_adamw", "original"]

# what torch's generators take; the noise has their last 64 bits as its key
SEEDS = (-(2**63), 2**64 - 1)


class ConfigError(InputError):
    """The configuration is not valid; the message names the key, its value and the fix."""


@contextmanager
def origin_named(origin: str) -> Iterator[None]:
    """Have a ConfigError of what is inside say where the configuration comes from."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{origin}: {error}") from error


@dataclass(frozen=True)
class Range:
    """Values from low to high; open ends are left out. None stands for a setting that is off, where its type has it.

    most: beyond it a value is a mistake, and to do what it says would take all memory or time.
    """

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False
    most: float = math.inf

    def holds(self, value: float) -> bool:
        above_low = value > self.low if self.open_low else value >= self.low
        return above_low and value <= self.most and (value < self.high if self.open_high else value <= self.high)

    def rule(self, value: float) -> str:
        """What a value must be, in words that fit the one that is not."""
        if value > self.most:
            return f"it must be at most {self.most:,}"
        if math.isinf(self.high):
            if self.low == 0 and not self.open_low:
                return "it must not be negative"
            return f"it must be {'above' if self.open_low else 'at least'} {self.low:g}"
        left, right = "(" if self.open_low else "[", ")" if self.open_high else "]"
        return f"it lies in {left}{self.low:g}, {self.high:g}{right}"


def above(low: float, *, default: Any, most: float = math.inf) -> Any:
    """A setting above a number."""
    return field(default=default, metadata={"range": Range(low, open_low=True, most=most)})


def at_least(low: float, *, default: Any, most: float = math.inf) -> Any:
    """A setting of a number or more."""
    return field(default=default, metadata={"range": Range(low, most=most)})


def within(low: float, high: float, *, default: Any, open_low: bool = False, open_high: bool = False) -> Any:
    """A setting between two numbers, which it may equal unless they are open."""
    return field(default=default, metadata={"range": Range(low, high, open_low, open_high)})


def check_ranges(settings: Any, prefix: str = "") -> None:
    """Raise ConfigError, naming key, value and range, for the first setting of a tree that is not in its range.

    A setting of several numbers has all of them in its range. A number that is not finite is in none, and a whole one
    without a greatest fits 64 bits. A section that gives an inherited setting another default keeps its range.
    """
    for entry in fields(settings):
        value, key = getattr(settings, entry.name), f"{prefix}{entry.name}"
        for part, place in _sections(value):
            check_ranges(part, f"{key}{place}.")
        wanted = _range(type(settings), entry.name)
        value = list(value) if isinstance(value, tuple) else value
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, float) and not math.isfinite(number):
                raise ConfigError(f"{key} is {value}; it must be a finite number")
            if wanted is not None and number is not None and not wanted.holds(number):
                off = ", or null for none" if entry.default is None or "None" in str(entry.type) else ""
                raise ConfigError(f"{key} is {value}; {wanted.rule(number)}{off}")
            if isinstance(number, int) and abs(number) >= 2**63 and (wanted is None or math.isinf(wanted.high)):
                raise ConfigError(f"{key} is {value}; it must be a number of 64 bits")


def refuse_unused(section: Any, kind: type, used: Collection[str], prefix: str, system: str) -> None:
    """Raise ConfigError for the first setting of a section that a system would ignore and that is not at its default.

    kind: the dataclass whose settings are meant, of which section may be a subclass. used: their names. prefix: what
    stands before them.
    """
    for entry in fields(kind):
        value, default = getattr(section, entry.name), entry.default
        if default is MISSING:
            default = entry.default_factory()
        if entry.name not in used and value != default:
            left = "null" if default is None else default
            raise ConfigError(f"{prefix}{entry.name} is {value}; {system} has no use for it, leave it at {left}")


def _sections(value: Any) -> list[tuple[Any, str]]:
    """The dataclasses that a value is, or is a list of, each with its place behind the key."""
    if is_dataclass(value):
        return [(value, "")]
    entries = enumerate(value) if isinstance(value, list) else ()
    return [(entry, f"[{i}]") for i, entry in entries if is_dataclass(entry)]


def _range(section: type, name: str) -> Range | None:
    """The range of a setting, from the nearest class that gives it one."""
    declared = (vars(kind).get("__dataclass_fields__", {}).get(name) for kind in section.__mro__)
    return next((entry.metadata["range"] for entry in declared if entry and "range" in entry.metadata), None)
