"""The contract of SequentialSystem: what the engine may ask of every system that draws piece after piece holds."""

from collections.abc import Callable

import pytest
import torch
from support.models import systems_of, tiny
from torch import Tensor

from pixelgen_fast import config as cfg
from pixelgen_fast.config import Objective, Sampling
from pixelgen_fast.models.system import SequentialSystem
from pixelgen_fast.signals import Stopped

OBJECTIVE = Objective()
NOISELESS = ("alitok",)  # whose loss draws nothing
NUMBERS = torch.tensor([5, 2**33, 7])


@pytest.fixture(params=systems_of(SequentialSystem))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def model(name: str) -> SequentialSystem:
    return tiny(name)


def images(count: int = 3) -> Tensor:
    return torch.randint(0, 256, (count, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))


def draw(
    model: SequentialSystem, labels: Tensor, numbers: Tensor, before: Callable[[], object] = int, **changes: object
) -> Tensor:
    settings = Sampling(**(dict(steps=3, guidance=1.5, seed=4) | changes))
    with torch.no_grad():
        return model.eval().draw(labels, numbers, settings, OBJECTIVE, before)


def test_the_parts_of_the_loss_are_named_and_one_number_an_image(model: SequentialSystem) -> None:
    parts = model(images(), torch.tensor([0, 1, 3]), NUMBERS, 11, OBJECTIVE)
    assert parts.keys() == model.loss_weights.keys()
    for part in parts.values():
        assert part.shape == (3,) and part.dtype == torch.float32 and part.isfinite().all()


def test_the_loss_of_an_image_does_not_depend_on_its_batch(model: SequentialSystem) -> None:
    y = torch.tensor([0, 1, 3])
    with torch.no_grad():
        whole = model.eval()(images(), y, NUMBERS, 11, OBJECTIVE)
        for i in range(3):
            alone = model(images()[i : i + 1], y[i : i + 1], NUMBERS[i : i + 1], 11, OBJECTIVE)
            for name, part in alone.items():
                torch.testing.assert_close(part[0], whole[name][i], rtol=1e-4, atol=1e-5)


def test_seed_number_and_class_count(model: SequentialSystem, name: str) -> None:
    y = torch.tensor([0, 1, 3])

    def losses(y: Tensor, numbers: Tensor, seed: int) -> list[Tensor]:
        with torch.no_grad():
            return list(model.eval()(images(), y, numbers, seed, OBJECTIVE).values())

    one = losses(y, NUMBERS, 11)
    others = [losses(torch.full((3,), 2), NUMBERS, 11), losses(y, NUMBERS, 12), losses(y, NUMBERS + 1, 11)]
    changed = [any(not torch.equal(a, b) for a, b in zip(one, other, strict=True)) for other in others]
    assert changed == [True, *[name not in NOISELESS] * 2]


def test_every_trained_weight_gets_a_gradient_and_every_block_is_a_module(model: SequentialSystem) -> None:
    modules = set(map(id, model.modules()))
    assert model.blocks() and all(id(block) in modules for block in (*model.blocks(), *model.whole_modules()))
    torch.manual_seed(0)
    parts = model.train()(images(), torch.tensor([0, 1, 3]), NUMBERS, 11, OBJECTIVE)
    sum(part.sum() for part in parts.values()).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_what_is_drawn_in_training_is_said(model: SequentialSystem) -> None:
    """A model that says it draws nothing from torch gives the same twice; the trainer would not seed it."""
    with torch.no_grad():
        first, second = (model.train()(images(), torch.tensor([0, 1, 3]), NUMBERS, 11, OBJECTIVE) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first) != model.draws


def test_a_sample_is_a_function_of_seed_number_and_label(model: SequentialSystem) -> None:
    labels, numbers = torch.tensor([0, 1, 2]), torch.tensor([3, 9, 2**33])
    whole = draw(model, labels, numbers)
    assert whole.shape == (3, 3, 16, 16) and whole.dtype == torch.float32 and whole.isfinite().all()
    order = torch.tensor([2, 0])
    torch.testing.assert_close(draw(model, labels[order], numbers[order]), whole[order], rtol=1e-4, atol=1e-4)
    for other in (draw(model, labels, numbers, seed=5), draw(model, labels, numbers + 1)):
        assert not torch.allclose(other, whole, atol=1e-3)
    assert not torch.allclose(draw(model, labels.flip(0), numbers)[0], whole[0], atol=1e-3)
    assert not torch.allclose(draw(model, labels, numbers, guidance=1.0), whole, atol=1e-3)


def test_a_drawing_can_be_ended_before_any_pass(model: SequentialSystem) -> None:
    calls: list[int] = []
    draw(model, torch.tensor([0]), torch.tensor([1]), lambda: calls.append(1))
    assert len(calls) > 3

    def stop() -> None:
        calls.pop()
        if len(calls) == 2:
            raise Stopped("SIGTERM")

    with pytest.raises(Stopped):
        draw(model, torch.tensor([0]), torch.tensor([1]), stop)


def test_settings_without_a_use_are_refused_by_name(model: SequentialSystem) -> None:
    model.check_settings(OBJECTIVE, Sampling())
    with pytest.raises(cfg.ConfigError, match="objective.frequency_weight is 1.0; .* has no use for it, leave it at"):
        model.check_settings(Objective(frequency_weight=1.0), Sampling())


def test_it_runs_in_bfloat16_with_tables_in_float32(model: SequentialSystem) -> None:
    model = model.bfloat16()
    assert {b.dtype for b in model.buffers()} <= {torch.float32}
    parts = model(images(), torch.tensor([0, 1, 3]), NUMBERS, 11, OBJECTIVE)
    assert all(part.isfinite().all() and part.dtype == torch.float32 for part in parts.values())
    assert draw(model, torch.tensor([0]), torch.tensor([1])).isfinite().all()


def test_images_of_another_size_are_refused(model: SequentialSystem) -> None:
    with pytest.raises(ValueError, match="built for images"):
        model(images()[:, :12], torch.tensor([0, 1, 3]), NUMBERS, 11, OBJECTIVE)
