"""A setting's range stands beside its default: what holds, what is refused, and how it is said."""

from dataclasses import dataclass, field

import pytest

from pixelgen_fast import config as cfg
from pixelgen_fast.settings import ConfigError, above, at_least, check_ranges, refuse_unused, within


@dataclass
class Inner:
    share: float = within(0, 1, open_high=True, default=0.5)
    pair: tuple[float, float] = within(0, 1, open_low=True, default=(0.1, 1.0))


@dataclass
class Outer:
    rate: float = above(0, default=1.0)
    count: int = at_least(0, default=0)
    clip: float | None = above(0, default=None)
    free: float = -3.0
    inner: Inner = field(default_factory=Inner)


@pytest.mark.parametrize(
    "values",
    [{}, {"rate": 1e-30, "count": 7, "clip": 2.0, "free": 1e9}, {"inner": Inner(0.0, (1e-9, 1.0))}, {"clip": None}],
)
def test_values_in_their_range_hold(values: dict) -> None:
    check_ranges(Outer(**values))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rate": 0.0}, "rate is 0.0; it must be above 0"),
        ({"count": -1}, "count is -1; it must not be negative"),
        ({"clip": 0.0}, "clip is 0.0; it must be above 0, or null for none"),
        ({"inner": Inner(share=1.0)}, r"inner.share is 1.0; it lies in \[0, 1\)"),
        ({"inner": Inner(pair=(0.0, 1.0))}, r"inner.pair is \[0.0, 1.0\]; it lies in \(0, 1\]"),
        ({"free": float("nan")}, "free is nan; it must be a finite number"),
        ({"rate": float("inf")}, "rate is inf; it must be a finite number"),
    ],
)
def test_values_out_of_it_are_named(values: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_ranges(Outer(**values))


def test_every_default_of_a_run_holds() -> None:
    check_ranges(cfg.Config(model=None))


def test_an_inherited_setting_keeps_its_range_under_another_default() -> None:
    @dataclass
    class Own(Inner):
        share: float = 0.25

    check_ranges(Own())
    with pytest.raises(ConfigError, match=r"share is 2.0; it lies in \[0, 1\)"):
        check_ranges(Own(share=2.0))


def test_sections_in_a_list_are_held_to_their_ranges() -> None:
    @dataclass
    class Parts:
        parts: list[Inner] = field(default_factory=lambda: [Inner(), Inner()])

    check_ranges(Parts())
    with pytest.raises(ConfigError, match=r"^of\.parts\[1\]\.share is 2\.0; it lies in"):
        check_ranges(Parts([Inner(), Inner(share=2.0)]), "of.")


def test_what_has_no_use_must_be_at_its_default() -> None:
    @dataclass
    class Wider(Outer):
        more: int = 1

    refuse_unused(Outer(rate=3.0), Outer, {"rate"}, "outer.", "a brick")
    refuse_unused(Wider(more=2), Outer, set(), "outer.", "a brick")
    with pytest.raises(ConfigError, match=r"^outer.rate is 3.0; a brick has no use for it, leave it at 1.0$"):
        refuse_unused(Outer(rate=3.0), Outer, {"clip"}, "outer.", "a brick")
    with pytest.raises(ConfigError, match=r"^outer.clip is 2.0; .* leave it at null$"):
        refuse_unused(Outer(clip=2.0), Outer, {"rate"}, "outer.", "a brick")
