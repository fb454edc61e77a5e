"""The training objective: both ways through a model are the same function, with every operator body."""

import pytest
import torch
from support.golden import relative
from torch import nn

from pixelgen_fast.config import ConfigError, Objective
from pixelgen_fast.diffusion.energy import EnergyPath
from pixelgen_fast.diffusion.path import to_unit
from pixelgen_fast.engine.alignment import FeatureAlignment, make_projector
from pixelgen_fast.engine.objective import FlowMatching
from pixelgen_fast.models import pixeldit

CONFIG = pixeldit.Settings(hidden_size=24, num_heads=2, patch_depth=1, patch_size=4, pixel_hidden_size=8, pixel_depth=1)


class Opaque(nn.Module):
    """A model that offers its prediction only."""

    fuses_loss = draws = guides_itself = False
    grounding_drop = None
    encode = staticmethod(to_unit)

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = model

    def forward(self, z: torch.Tensor, t: torch.Tensor, y: torch.Tensor, **tap: int) -> torch.Tensor:
        return self.inner(z, t, y, **tap)


def random_model(**changes) -> pixeldit.PixelDiT:
    torch.manual_seed(0)
    model = pixeldit.build(pixeldit.Settings(**(vars(CONFIG) | changes)), 8, 3)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    images = torch.randint(0, 256, (3, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(4))
    return images, torch.tensor([0, 1, 2]), torch.tensor([7, 8, 2**33])


@pytest.mark.parametrize("body", ["reference", "triton"])
@pytest.mark.parametrize("post", [False, True])
@pytest.mark.parametrize("space", ["v", "x"])
def test_noising_inside_the_operators_is_the_same_objective(
    body: str, post: bool, space: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = random_model(post_modulation=post)
    objective = Objective(loss=space, noise_scale=1.5, time_shift=2.0, class_drop=0.5)

    monkeypatch.setenv("PIXELGEN_OPS", "reference")
    plain = FlowMatching(Opaque(model), objective, seed=11, null_class=3)(*batch())
    plain.backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()

    monkeypatch.setenv("PIXELGEN_OPS", body)
    fused = FlowMatching(model, objective, seed=11, null_class=3)(*batch())
    fused.backward()
    assert fused.item() == pytest.approx(plain.item(), rel=1e-5)
    for (name, p), gradient in zip(model.named_parameters(), expected, strict=True):
        assert relative(p.grad, gradient) < 1e-4, name


class Twofold(Opaque):
    """A model whose weaker prediction is half of its prediction."""

    guides_itself = True

    def forward(self, z: torch.Tensor, t: torch.Tensor, y: torch.Tensor, both: bool) -> tuple[torch.Tensor, ...]:
        prediction = self.inner(z, t, y)
        return prediction, prediction / 2


@pytest.mark.parametrize("objective", [Objective(), Objective(predict="x", noise_scale=1.5, time_min=0.2)])
def test_a_weaker_prediction_learns_by_the_same_loss(objective: Objective) -> None:
    """Two predictions p and p / 2 have the losses of two models that say so."""
    model = random_model()
    both = FlowMatching(Twofold(model), objective, seed=11, null_class=3)
    assert both.weights == {"flow": 1.0, "base": 1.0}
    total = both(*batch()).item()
    flow = FlowMatching(Opaque(model), objective, seed=11, null_class=3)(*batch()).item()
    with torch.no_grad():
        model.head.linear.weight /= 2
        model.head.linear.bias /= 2
    base = FlowMatching(Opaque(model), objective, seed=11, null_class=3)(*batch()).item()
    assert both.parts["flow"].item() == pytest.approx(flow, rel=1e-5)
    assert both.parts["base"].item() == pytest.approx(base, rel=1e-5) and total == pytest.approx(flow + base, rel=1e-5)


def test_tapped_tokens_are_those_after_the_block() -> None:
    """The tokens after block k are what the same model without the later blocks hands to its pixel stage."""
    model = random_model(patch_depth=3)
    z, t, y = torch.randn(2, 3, 8, 8), torch.rand(2), torch.tensor([0, 3])
    prediction = model(z, t, y)
    handed = []
    model.pixel_stage = lambda pixels, s: handed.append(s) or pixeldit.PixelDiT.pixel_stage(model, pixels, s)
    blocks = model.patch_blocks
    for k in (3, 1, 2):
        model.patch_blocks = blocks
        tapped_prediction, tokens = model(z, t, y, tap=k)
        assert torch.equal(tapped_prediction, prediction) and tokens.shape == (2, 4, 24)
        model.patch_blocks = blocks[:k]
        model(z, t, y)
        condition = nn.functional.silu(model.t_embed(t)[:, None] + tokens)
        assert torch.equal(condition, handed[-1]), k
    model.patch_blocks = blocks
    for k in (0, 4):
        with pytest.raises(ValueError, match=f"tap {k}: this PixelDiT has blocks 1 to 3"):
            model(z, t, y, tap=k)


@pytest.mark.parametrize("body", ["reference", "triton"])
def test_alignment_is_added_on_both_ways(body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """loss = flow + weight x alignment of the tokens that the model has of z, fused or not, with equal gradients."""
    model = random_model(patch_depth=2)
    features = torch.randn(3, 4, 5)
    alignment = FeatureAlignment(
        lambda images, numbers: features,
        make_projector("mlp", 24, 5, 6),
        width=24,
        layer=1,
        weight=0.3,
        device=torch.device("cpu"),
    )
    objective, images_labels_numbers = Objective(class_drop=0.5), batch()
    seen = []
    hook = alignment.register_forward_hook(lambda module, arguments, loss: seen.append((arguments, loss)))

    monkeypatch.setenv("PIXELGEN_OPS", "reference")
    flow = FlowMatching(model, objective, seed=11, null_class=3)(*images_labels_numbers)
    plain = FlowMatching(Opaque(model), objective, 11, 3, alignment)
    total = plain(*images_labels_numbers)
    total.backward()
    (tokens, images, numbers), loss_B = seen.pop()
    assert loss_B.shape == (3,) and tokens.shape == (3, 4, 24)
    assert torch.equal(images, images_labels_numbers[0]) and torch.equal(numbers, images_labels_numbers[2])
    assert total.item() == pytest.approx(flow.item() + 0.3 * loss_B.mean().item(), rel=1e-5)
    assert plain.weights == {"flow": 1.0, "alignment": 0.3}
    assert plain.parts["flow"].item() == pytest.approx(flow.item(), rel=1e-5)
    assert plain.parts["alignment"].item() == loss_B.mean().item() and not plain.parts["alignment"].requires_grad
    parameters = dict(model.named_parameters()) | dict(alignment.named_parameters())
    expected = {name: p.grad.clone() for name, p in parameters.items()}
    model.zero_grad()
    alignment.zero_grad()

    monkeypatch.setenv("PIXELGEN_OPS", body)
    fused = FlowMatching(model, objective, 11, 3, alignment)(*images_labels_numbers)
    fused.backward()
    hook.remove()
    assert fused.item() == pytest.approx(total.item(), rel=1e-5)
    for name, p in parameters.items():
        assert relative(p.grad, expected[name]) < 1e-4, name


@pytest.mark.parametrize("predict", ["v", "x", "e"])
def test_the_frequency_loss_compares_velocities(predict: str) -> None:
    """Prediction and truth are read as velocities at z; the fused way is left, since it has no prediction to give."""
    from pixelgen_fast.diffusion.frequency import frequency_loss

    model = random_model()
    images, labels, numbers = batch()
    objective = Objective(predict=predict, loss="v", class_drop=0.0, frequency_weight=0.7, frequency_quality=60)
    module = FlowMatching(model, objective, 11, 3)
    asked = []
    model.register_forward_hook(lambda module, arguments, prediction: asked.append((arguments, prediction)))
    total = module(images, labels, numbers)
    (z, t, _), answer = asked.pop()
    flow = FlowMatching(Opaque(model), Objective(predict=predict, loss="v", class_drop=0.0), 11, 3)(
        images, labels, numbers
    )
    assert model.velocity_loss is not None and module.weights == {"flow": 1.0, "frequency": 0.7}
    t = t[:, None, None, None]
    x = images.permute(0, 3, 1, 2) / 127.5 - 1
    e = (z - t * x) / (1 - t)
    velocity = {
        "v": (answer, x - e),
        "x": ((answer - z) / (1 - t).clamp(min=0.05), (x - z) / (1 - t).clamp(min=0.05)),
        "e": ((z - answer) / t.clamp(min=0.05), (z - e) / t.clamp(min=0.05)),
    }[predict]
    frequency = frequency_loss(*velocity, 60).mean()
    assert module.parts["frequency"].item() == pytest.approx(frequency.item(), rel=1e-4)
    assert total.item() == pytest.approx(flow.item() + 0.7 * frequency.item(), rel=1e-4)


@pytest.mark.parametrize("predict", ["v", "x"])
@pytest.mark.parametrize("frequency", [0.0, 0.7])
def test_on_the_energy_guided_path_only_the_pair_is_another(predict: str, frequency: float) -> None:
    """z, v and how x is read, from the path; the noise, the times and the labels are those of the linear one."""
    from pixelgen_fast.diffusion.frequency import frequency_loss

    model, inputs = random_model(), batch()
    common = dict(predict=predict, time_shift=2.0, noise_scale=1.5, class_drop=0.5, t_eps=0.1)
    objective = Objective(**common, path="energy_guided", sigma0=2.0, release=(0.1, 0.8), frequency_weight=frequency)
    module, asked = FlowMatching(model, objective, 11, 3), []
    model.register_forward_hook(lambda module, arguments, prediction: asked.append((arguments, prediction)))
    module(*inputs).backward()
    FlowMatching(Opaque(model), Objective(**common), 11, 3)(*inputs)
    ((z, t, y), answer), ((plain_z, plain_t, plain_y), _) = asked
    assert torch.equal(t, plain_t) and torch.equal(y, plain_y) and not z.requires_grad

    x, w = to_unit(inputs[0]), t[:, None, None, None]
    e = (plain_z - w * x) / (1 - w)
    path = EnergyPath(2.0, (0.1, 0.8))
    end = path.endpoint(x, t)
    torch.testing.assert_close(z, w * end.x + e * (1 - w), rtol=0, atol=1e-5)
    if predict == "v":
        found, wanted = answer, end.x + w * end.rate - e
    else:
        of_answer = path.endpoint(answer, t)
        found, wanted = (w * side.rate + (side.x - z) / (1 - w).clamp(min=0.1) for side in (of_answer, end))
    expected = {"flow": (found - wanted).square().mean()}
    if frequency:
        expected["frequency"] = frequency_loss(found, wanted, 85).mean()
    assert module.parts.keys() == expected.keys()
    for name, value in expected.items():
        assert module.parts[name].item() == pytest.approx(value.item(), rel=1e-4), name
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_the_path_is_refused_for_what_is_no_image() -> None:
    model = random_model()
    model.__class__ = type("Latent", (pixeldit.PixelDiT,), {"sample_shape": (4, 2, 2)})
    objective = Objective(path="energy_guided")
    with pytest.raises(ConfigError, match=r"blurs images, and Latent flows to \[4, 2, 2\] instead of \[3, 8, 8\]"):
        FlowMatching(model, objective, 11, 3)


class Drawing(torch.nn.Module):
    """A generator that draws: dropout, and grounding which is handed to it."""

    draws, grounding_drop, guides_itself = True, 0.5, False
    encode = staticmethod(to_unit)

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, z: torch.Tensor, t: torch.Tensor, y: torch.Tensor, ground: torch.Tensor) -> torch.Tensor:
        self.ground = ground
        return torch.nn.functional.dropout(z * self.weight, 0.5)


def test_dropout_repeats_with_the_micro_batch_and_grounding_with_the_image() -> None:
    model = Drawing()
    module = FlowMatching(model, Objective(predict="x"), seed=7, null_class=10)
    images = torch.zeros(64, 8, 8, 3, dtype=torch.uint8)

    def loss(first: int) -> float:
        module.begin(first)
        return float(module(images, torch.zeros(64, dtype=torch.int64), torch.arange(64) + 128).detach())

    assert loss(128) == loss(128) != loss(192)
    whole = model.ground
    module(images[:2], torch.zeros(2, dtype=torch.int64), torch.tensor([130, 191]))
    assert whole.dtype == torch.bool and 16 < int(whole.sum()) < 48
    assert torch.equal(model.ground, whole[[2, 63]])
