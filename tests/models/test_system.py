"""The contract of models/system.py: what the engine may ask of every system holds for every system."""

from pathlib import Path

import pytest
import torch
from pixelgen_kernels import philox
from support.models import batch, systems_of, tiny
from support.teachers import write_teacher
from torch import nn

from pixelgen_fast import models
from pixelgen_fast.diffusion.loss import flow_loss
from pixelgen_fast.diffusion.path import Noising
from pixelgen_fast.diffusion.solver import to_uint8
from pixelgen_fast.models import built_on
from pixelgen_fast.models.system import BaseSystem, Settings, System
from pixelgen_fast.runs.draw import load_for_other_classes

DINO = "vit_small_patch16_dinov3_qkvb"


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_teacher(tmp_path_factory.mktemp("dino") / "small", DINO))


def on_dino(name: str, dino: str) -> dict[str, str]:
    return dict(dino=DINO, weights=dino) if built_on.DINO in models.model_schema(name).built_on else {}


@pytest.fixture(params=systems_of(System))
def model(request: pytest.FixtureRequest, dino: str) -> System:
    """A flow; tests/models/test_sequential.py has the systems that draw piece after piece."""
    return tiny(request.param, **on_dino(request.param, dino))


@pytest.fixture(params=models.systems())
def any_model(request: pytest.FixtureRequest, dino: str) -> BaseSystem:
    return tiny(request.param, **on_dino(request.param, dino))


def test_a_system_is_built_from_its_settings(any_model: BaseSystem) -> None:
    assert any_model.image_size == 16 and any_model.grid == 4 and any_model.num_classes == 3
    assert any_model.head_dim * 2 == any_model.hidden_size == 24


@pytest.mark.parametrize("name", models.systems())
def test_settings_name_their_system_and_say_every_default(name: str) -> None:
    settings = models.model_schema(name)()
    assert isinstance(settings, Settings) and settings.system == name
    assert settings.hidden_size % settings.num_heads == 0 and settings.patch_size > 0


def test_it_predicts_an_image_and_offers_its_tokens(model: System) -> None:
    z, t, y = batch(shape=model.sample_shape)
    with torch.no_grad():
        plain = model.eval()(z, t, y)
        assert plain.shape == z.shape and plain.isfinite().all()
        for tap in range(model.first_tap, model.tap_depth + 1):
            prediction, tokens = model(z, t, y, tap=tap)
            assert torch.equal(prediction, plain) and tokens.shape == (2, 16, model.tap_width(tap))
        with pytest.raises(ValueError, match="tap"):
            model(z, t, y, tap=model.tap_depth + 1)
        with pytest.raises(ValueError, match="was built for"):
            model(z[..., :-1], t, y)


def test_a_null_class_is_a_class_of_its_own(model: System) -> None:
    z, t, _ = batch(shape=model.sample_shape)
    with torch.no_grad():
        first, none = (model.eval()(z, t, torch.full((2,), y)) for y in (0, 3))
    assert not torch.equal(first, none)


def test_other_classes_begin_anew_and_the_rest_of_the_weights_does_not(any_model: BaseSystem) -> None:
    model = any_model
    state = {name: torch.full_like(value, 0.25) for name, value in model.state_dict().items()}
    table = model.state_dict()[model.class_table].clone()
    assert len(table) == model.num_classes + 1
    state[model.class_table] = torch.full((len(table) + 3, table.shape[1]), 0.25)
    said = load_for_other_classes(model, state, "weights")
    assert f"{model.num_classes + 3} classes" in said and f"this run {model.num_classes}:" in said
    own = model.state_dict()
    assert torch.equal(own[model.class_table][:-1], table[:-1])
    assert all((value == 0.25).all() for name, value in own.items() if name != model.class_table)
    assert (own[model.class_table][-1] == 0.25).all()


def test_every_block_is_a_module_of_the_model_and_every_trained_weight_gets_a_gradient(model: System) -> None:
    modules = set(map(id, model.modules()))
    assert model.blocks() and all(id(block) in modules for block in (*model.blocks(), *model.whole_modules()))
    z, t, y = batch(shape=model.sample_shape)
    torch.manual_seed(0)
    predictions = model.train()(z, t, y, both=True) if model.guides_itself else (model.train()(z, t, y),)
    sum(prediction.square().mean() for prediction in predictions).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_what_is_drawn_in_training_is_said(model: System) -> None:
    """A model that says it draws nothing gives the same twice; the trainer would not seed it."""
    z, t, y = batch(shape=model.sample_shape)
    ground = {} if model.grounding_drop is None else {"ground": torch.tensor([True, False])}
    with torch.no_grad():
        same = torch.equal(model.train()(z, t, y, **ground), model(z, t, y, **ground))
    assert same != model.draws


def test_a_fused_loss_is_that_of_the_prediction(model: System) -> None:
    images = torch.randint(0, 256, (2, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    _, t, y = batch()
    noising, weight = Noising(torch.tensor([5, 2**33]), t, 7, 1.0), torch.tensor([0.5, 2.0])
    if not model.fuses_loss:
        with pytest.raises(TypeError, match="does not fuse"):
            model.velocity_loss(images, y, noising, weight)
        return
    z, x, e = noising.of(images)
    assert torch.equal(e.flatten(1), philox.normal(7, noising.numbers, philox.NOISE, 768))
    expected = weight * flow_loss(model(z, t, y), x, e, t, predict="v", loss_space="v")
    torch.testing.assert_close(model.velocity_loss(images, y, noising, weight), expected, rtol=1e-4, atol=1e-5)


def test_encoded_images_have_the_shape_of_samples_and_are_decoded_to_what_they_were(model: System) -> None:
    images = torch.randint(0, 256, (2, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    x = model.encode(images)
    assert x.shape == (2, *model.sample_shape) and x.dtype == torch.float32
    assert torch.equal(to_uint8(model.decode(x)), images)


def test_a_system_that_guides_itself_gives_its_prediction_and_a_weaker_one(model: System) -> None:
    if not model.guides_itself:
        return
    z, t, y = batch(shape=model.sample_shape)
    with torch.no_grad():
        prediction, weaker = model.eval()(z, t, y, both=True)
        assert torch.equal(prediction, model(z, t, y)) and not torch.allclose(prediction, weaker)
        (again, _), tokens = model(z, t, y, tap=1, both=True)
        assert torch.equal(again, prediction) and tokens.shape == (2, 16, model.tap_width(1))


def test_tables_keep_float32_when_the_model_is_cast(model: System) -> None:
    assert {b.dtype for b in model.bfloat16().buffers(recurse=False)} == {torch.float32}


@pytest.mark.parametrize("name", models.systems())
def test_an_image_that_is_no_multiple_of_the_patch_is_refused(name: str, dino: str) -> None:
    with pytest.raises(ValueError, match="data.image_size 18 does not divide into model.patch_size 4 patches"):
        tiny(name, image_size=18, **on_dino(name, dino))


def test_nothing_is_asked_of_a_model_behind_the_contract() -> None:
    """No hasattr or getattr on a model or its settings outside of models/."""
    root = Path(models.__file__).parents[1]
    asked = [
        f"{path.relative_to(root)}:{number}"
        for path in root.rglob("*.py")
        if path.parent.name not in ("models", "dino")
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if ("hasattr(" in line or "getattr(" in line) and ("model" in line or "(form" in line)
    ]
    assert asked == []


class _Unfinished(System):
    pass


def test_a_system_that_lacks_a_method_cannot_be_built() -> None:
    with pytest.raises(TypeError, match="abstract"):
        _Unfinished(Settings(hidden_size=8), 16, 3, tap_depth=1)
    assert issubclass(_Unfinished, nn.Module)
