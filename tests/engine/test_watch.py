"""Whether a run is sound: bad steps, the range of the loss, and which checkpoint a step proves."""

import math

import pytest
import torch

from pixelgen_fast.engine.watch import Health, Step, StepWatch


def health(losses: list[float], loss_range: float | None = 10.0) -> Health:
    """After steps of 8 images with these losses; nan for a skipped one."""
    found, skipped = Health(loss_range), 0
    for number, loss in enumerate(losses):
        skipped = skipped + 1 if math.isnan(loss) else 0
        found.add(Step(8 * number, 8 * number + 8, skipped, loss))
    return found


def test_the_device_is_read_in_order() -> None:
    watch = StepWatch(torch.device("cpu"))
    for number, (skipped, losses) in enumerate([(0, [2.0, 3.0, 9.0]), (1, [0.0, 0.0, 0.0]), (2, [1.0, 4.0, 0.0])]):
        watch.push(torch.tensor(skipped), torch.tensor(losses), 8 * number, 8 * number + 8)
    found = list(watch.poll(wait=True))
    assert [step[:3] for step in found] == [(0, 8, 0), (8, 16, 1), (16, 24, 2)]
    assert [found[0].loss, found[2].loss] == [1.5, 4.0] and math.isnan(found[1].loss)
    assert list(watch.poll()) == []


@pytest.mark.parametrize(
    ("losses", "loss_range", "in_a_row"),
    [
        ([1.0, 1.2, 0.8], 10.0, 0),
        ([1.0, math.nan, math.nan], 10.0, 2),
        ([1.0, 1e30, 1e30, math.nan], 10.0, 3),
        ([1.0, 1e30, 1e30, 1.0], 10.0, 0),
        ([1.0, 9.0], 10.0, 0),
        ([1.0, 11.0], 10.0, 1),
        ([1.0, 1e30], None, 0),
        ([1e30, 1.0], 10.0, 0),
    ],
)
def test_a_bad_step_is_skipped_or_out_of_range(losses: list[float], loss_range: float | None, in_a_row: int) -> None:
    assert health(losses, loss_range).bad_in_a_row == in_a_row


def test_a_bad_step_is_named() -> None:
    found = health([1.0])
    assert found.add(Step(8, 16, 0, 1.0)) == ""
    assert "images 16 to 24: loss 1e+30 is far above 1, its mean; no checkpoint is written (1 in a row)" in found.add(
        Step(16, 24, 0, 1e30)
    )
    assert "images 24 to 32 skipped: loss or gradient is not finite (2 in a row)" in found.add(Step(24, 32, 1, 1.0))


@pytest.mark.parametrize(
    ("after", "good"),
    [
        ([], None),
        ([1.0], 16),
        ([1e30, math.nan], None),
        ([5.0], None),
        ([5.0, 1.0], 16),
    ],
)
def test_the_loss_of_the_step_behind_it_proves_a_checkpoint(after: list[float], good: int | None) -> None:
    found = health([1.0, 1.0])
    found.saved(16)
    for number, loss in enumerate(after):
        found.add(Step(16 + 8 * number, 24 + 8 * number, int(math.isnan(loss)), loss))
    assert found.good == good


def test_a_checkpoint_is_not_proven_by_the_step_that_led_to_it() -> None:
    found = health([1.0])
    found.saved(16)
    found.add(Step(8, 16, 0, 1.0))
    assert found.good is None


def test_a_checkpoint_may_have_been_proven_while_it_was_written() -> None:
    found = health([1.0, 1.0, 1.0])
    found.saved(16)
    assert found.good == 16 and found.kept == {16}
    found.saved(24)
    assert found.good == 16 and found.kept == {16, 24}


def test_a_resumed_run_knows_the_range_of_its_loss() -> None:
    found = health([1.0, 1.0])
    found.saved(16)
    found.add(Step(16, 24, 0, 1.0))
    again = Health(10.0)
    again.resume(found.state(), 24)
    assert again.good == 16
    again.add(Step(24, 32, 0, 1e30))
    assert (again.bad_in_a_row, again.good) == (1, 16)


@pytest.mark.parametrize("state", [None, [], {"loss": "1", "steps": 1, "good": None}, {"loss": 1.0, "steps": 1}])
def test_a_checkpoint_that_tells_nothing_of_its_losses_is_resumed(state: object) -> None:
    found = Health(10.0)
    found.resume(state, 24)
    assert found.add(Step(24, 32, 0, 1e30)) == "" and found.good == 24


def test_a_checkpoint_that_the_run_returned_to_stays_the_good_one() -> None:
    """It was proven after it had been written, so that its own state names an older one, or none."""
    found = health([1.0])
    found.resume({"loss": 1.0, "steps": 3, "good": None}, 48, proven=True)
    assert found.good == 48 and found.kept == {48}
    found.resume("nothing of this", 48)
    assert found.good is None and found.mean == found.count == 0
