"""Curves of a run: seconds by what they went to, events, and as many points as a page holds."""

import math

import pytest

from pixelgen_fast.pages.panels import MOST_POINTS, curves, events, seconds_of, where_time_went


def row(nimg: int, **more: float | None) -> dict:
    return {"nimg": nimg, "step": nimg // 10, "loss": 1.0, "images_per_second": 50.0, "begun_at": 0, **more}


def test_an_interval_is_its_steps_the_waiting_in_them_and_the_pauses() -> None:
    """100 images at 50 a second: 2 s of steps, a quarter of them waiting and a tenth the teacher; 3 s besides."""
    found = seconds_of(row(100), row(200, loader_wait_share=0.25, teacher_share=0.1, saving_seconds=3.0))
    assert found == pytest.approx({"loader": 0.5, "teacher": 0.2, "steps": 1.3, "saving": 3.0, "drawing": 0.0})
    assert seconds_of(row(100), row(200, images_per_second=None)) == {}


def test_all_intervals_together_most_first() -> None:
    rows = [row(100, drawing_seconds=9.0), row(200, loader_wait_share=0.5), row(300)]
    assert where_time_went(rows) == pytest.approx(
        {"grids": 9.0, "training steps": 5.0, "waiting for images": 1.0, "checkpoints": 0.0}
    )
    assert next(iter(where_time_went(rows))) == "grids"


def test_a_run_that_was_begun_from_a_later_image_has_no_time_before_it() -> None:
    assert sum(where_time_went([row(1000, begun_at=900)]).values()) == pytest.approx(2.0)


def test_events() -> None:
    rows = [
        row(100),
        row(200, skipped_steps=0),
        row(300, skipped_steps=3),
        {"nimg": 300, "share": 0.5},  # of another kind
        row(400, begun_at=320, skipped_steps=0),
        row(500, begun_at=400, returns=1),
        row(600, begun_at=400, returns=1),
    ]
    rows[4]["returns"] = 0
    assert events(rows) == [
        (300, "3 steps skipped"),
        (320, "resumed"),
        (400, "went back to this image after bad steps"),
    ]


def test_a_long_run_is_drawn_by_means_of_rows_that_stand_together() -> None:
    rows = [row(10 * k, loss=None if k == 2 else float(k)) for k in range(1, 2 * MOST_POINTS + 2)]
    found = curves(rows)
    assert found.each == 3
    assert found.columns["nimg"][:2] == [30, 60] and found.columns["nimg"][-1] == rows[-1]["nimg"]
    assert found.columns["loss"][:2] == [2.0, 5.0]  # (1 + 3) / 2, the second has none; (4 + 5 + 6) / 3
    assert {len(column) for column in found.columns.values()} == {math.ceil(len(rows) / 3)}


def test_every_column_that_holds_something_is_on_a_panel_and_the_clock_on_none() -> None:
    rows = [row(100, loss_alignment=0.5, judged=0.25, skipped_steps=0, replaced_images=2, loader_wait_share=0.1)]
    found = curves(rows)
    shown = [name for panel in found.panels for name, _ in panel.series]
    assert shown[:2] == ["loss", "loss_alignment"] and {"judged", "time_loader", "replaced_images"} <= set(shown)
    assert not {"nimg", "step", "begun_at", "skipped_steps"} & set(shown)
    assert len(shown) == len(set(shown)) and set(shown) <= set(found.columns)


def test_what_is_measured_now_and_then_is_a_line_through_its_points() -> None:
    rows = [{"nimg": 10 * k, "loss": 1.0} for k in range(1, 7)]
    rows[1] |= {"validation_loss": 4.0, "validation_loss_t0.0625": 1.0}
    rows[4] |= {"validation_loss": 1.0, "validation_loss_t0.0625": 1.0}
    found = curves(rows)
    assert found.columns["validation_loss"] == [None, 4.0, 3.0, 2.0, 1.0, None]
    titles = [panel.title for panel in found.panels]
    assert titles[:3] == ["Loss", "Validation loss", "Validation loss by time"]


def test_time_that_some_intervals_have_is_none_in_the_others() -> None:
    """Validation every second row: its line has a point at each row, so that it is drawn."""
    rows = [row(100 * k, **({"validation_seconds": 2.0} if k % 2 else {})) for k in range(1, 5)]
    assert curves(rows).columns["time_validation"] == pytest.approx([0.5, 0.0, 0.5, 0.0])


def test_a_run_whose_first_rows_are_of_a_version_that_did_not_say_where_they_began_was_resumed() -> None:
    rows = [row(100), row(200), row(300, begun_at=200)]
    del rows[0]["begun_at"], rows[1]["begun_at"]
    assert events(rows) == [(200, "resumed")]
    assert events(rows[2:]) == []
