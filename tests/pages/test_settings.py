"""The table of a configuration."""

from pixelgen_fast import config as cfg
from pixelgen_fast.models import model_schema
from pixelgen_fast.pages.settings import defaults_of, settings_table


def test_what_differs_from_the_defaults_is_marked_and_nothing_else() -> None:
    config = cfg.from_dict(
        {"model": {"system": "pixeldit", "patch_depth": 3}, "optimizer": {"lr": 2e-4, "betas": [0.9, 0.999]}},
        model_schema,
    )
    html = settings_table(cfg.to_dict(config), defaults_of(config))
    assert html.count('class="changed"') == 2
    assert "<td>patch_depth</td><td>3</td><td>default " in html
    assert "<td>lr</td><td>0.0002</td><td>default 0.0001</td>" in html
    assert "1 of" in html and "<td>betas</td><td>[0.9, 0.999]</td><td></td>" in html


def test_markup_in_a_value_stays_text_and_unknown_defaults_mark_nothing() -> None:
    html = settings_table({"run": {"dir": "<script>"}, "odd": 3}, None)
    assert "<script>" not in html and "&lt;script&gt;" in html and "changed" not in html


def test_settings_within_settings_are_rows_of_their_own() -> None:
    config = cfg.from_dict({"model": {"system": "pixeldit"}, "data": {"validation": {"share": 0.1}}}, model_schema)
    html = settings_table(cfg.to_dict(config), defaults_of(config))
    assert "<td>validation.share</td><td>0.1</td><td>default 0</td>" in html
    assert html.count('class="changed"') == 1 and "<td>validation.seed</td><td>0</td><td></td>" in html
