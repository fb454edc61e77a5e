"""The patch autoregressor against slow twins that keep nothing and loop over images, patches and draws, in float64."""

import copy
import itertools
import math
from pathlib import Path

import pytest
import torch
from pixelgen_kernels import philox
from support.finite_differences import check_gradient
from support.models import tiny_of
from torch import Tensor, nn

from pixelgen_fast import config as cfg
from pixelgen_fast import models
from pixelgen_fast.config import Objective, Sampling
from pixelgen_fast.errors import InputError
from pixelgen_fast.models import patch_ar
from pixelgen_fast.models.patch_ar import PatchAR

CONFIGS = Path(__file__).parents[2] / "configs"
tiny = tiny_of("patch_ar")
PIXEL = dict(head="pixel", head_width=1024, pixel_channels=8)
VARIANTS = {
    "causal, mlp": {},
    "causal, pixel": PIXEL,
    "masked, mlp": dict(trunk="masked"),
    "masked, pixel": dict(PIXEL, trunk="masked"),
    "causal, bottleneck": dict(bottleneck=5),
    "masked, bottleneck": dict(trunk="masked", bottleneck=5, guidance_schedule="constant"),
}
X = Objective(predict="x", loss="v", time_mean=-0.8, time_std=0.8, noise_scale=1.5, t_eps=0.1)
NUMBERS, LABELS = torch.tensor([5, 2**33]), torch.tensor([2, 0])
W, SEED = 48, 4


def patches_of(images: Tensor) -> Tensor:
    """uint8 [B, 16, 16, 3] as patches [B, 16, 48] of 4 x 4 pixels, row by row."""
    return torch.stack([
        torch.stack([
            (image[4 * r : 4 * r + 4, 4 * c : 4 * c + 4].double() / 127.5 - 1).flatten()
            for r in range(4) for c in range(4)
        ])
        for image in images
    ])  # fmt: skip


def image_of(patches: Tensor) -> Tensor:
    """Patches [16, 48] as an image [3, 16, 16]."""
    image = torch.empty(3, 16, 16, dtype=patches.dtype)
    for n, patch in enumerate(patches):
        r, c = divmod(n, 4)
        image[:, 4 * r : 4 * r + 4, 4 * c : 4 * c + 4] = patch.view(4, 4, 3).permute(2, 0, 1)
    return image


def normal(seed: int, number: Tensor, stream: int, *shape: int) -> Tensor:
    return philox.normal(seed, number[None], stream, math.prod(shape)).double().view(shape)


def sphere(h: Tensor) -> Tensor:
    return h / (h.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def order_of(seed: int, number: Tensor) -> list[int]:
    """The patches of an image by the size of their words: those in front stay hidden longest."""
    words = philox.words(seed, number[None], philox.MASK_ORDER, 16)[0].tolist()
    return sorted(range(16), key=lambda n: (words[n], n))


def slow_piece(model: PatchAR, e: Tensor, z: Tensor, z_null: Tensor, w: float, s: Sampling) -> Tensor:
    """A piece [d] by Heun's method, whose last step is Euler's, x-prediction with a floor of t_eps under 1 - t."""

    def v(u: Tensor, t: float) -> Tensor:
        def of(state: Tensor) -> Tensor:
            x = model.head(u[None], torch.tensor([t], dtype=torch.float64), state[None])[0]
            return (x - u) / max(1 - t, X.t_eps)

        low, high = s.interval or (-1, 2)
        return of(z_null) + w * (of(z) - of(z_null)) if low < t < high else of(z)

    grid = [i / s.steps / (i / s.steps + (1 - i / s.steps) * s.shift) for i in range(s.steps + 1)]
    u = s.temperature * X.noise_scale * e
    for i, (t, after) in enumerate(itertools.pairwise(grid)):
        first = v(u, t)
        second = first if i == s.steps - 1 else v(u + (after - t) * first, after)
        u = u + (after - t) * (first + second) / 2
    return u


def slow_draw(model: PatchAR, number: Tensor, label: Tensor, s: Sampling) -> Tensor:
    """One image, the trunk run on all that is known for each piece."""
    d, null = model.piece_width, torch.tensor([model.num_classes])
    e, patches = normal(s.seed, number, philox.SAMPLING, 16, d), torch.zeros(16, W, dtype=torch.float64)

    def tell(n: int, z: Tensor, z_null: Tensor, known: int) -> Tensor:
        w = s.guidance if model.guidance_schedule == "constant" else 1 + (s.guidance - 1) * known / 16
        piece = slow_piece(model, e[n], z, z_null, w, s)
        return piece if model.codec is None else model.codec.decoder(sphere(piece))

    if not model.masked:
        for n in range(16):
            z, z_null = (model.trunk(patches[None, :n], y)[0, n] for y in (label[None], null))
            patches[n] = tell(n, z, z_null, n + 1)
        return image_of(patches)
    hidden, passes = order_of(s.seed, number), min(s.passes, 16)
    for done in range(1, passes + 1):
        left = max(1, min(len(hidden) - 1, math.floor(16 * math.cos(math.pi / 2 * done / passes))))
        left = 0 if done == passes else left
        mask = torch.tensor([[n in hidden for n in range(16)]])
        z, z_null = (model.trunk(patches[None], mask, y, 16 - len(hidden))[0] for y in (label[None], null))
        for n in hidden[left:]:
            patches[n] = tell(n, z[n], z_null[n], 16 - left)
        hidden = hidden[:left]
    return image_of(patches)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_sample_is_that_of_a_slow_sampler(name: str) -> None:
    model = tiny(**VARIANTS[name]).double().eval()
    settings = Sampling(
        steps=3, solver="heun", guidance=2.5, interval=(0.1, 0.9), shift=1.7, temperature=0.8, passes=5, seed=SEED
    )
    if not model.masked:
        settings.passes = Sampling().passes
    with torch.no_grad():
        found = model.draw(LABELS, NUMBERS, settings, X, int)
        for i in range(2):
            wanted = slow_draw(model, NUMBERS[i], LABELS[i], settings)
            torch.testing.assert_close(found[i].double(), wanted, rtol=1e-5, atol=1e-5)


def test_kept_keys_and_values_change_nothing() -> None:
    """In float64 the states are the same to rounding, with the cache and without."""
    trunk = tiny().double().trunk
    x, y = torch.randn(2, 16, W, dtype=torch.float64), torch.tensor([1, 3])
    past, states = trunk.past(2), []
    with torch.no_grad():
        states.append(trunk(x[:, :0], y, past))
        states += [trunk(x[:, n : n + 1], None, past) for n in range(15)]
        torch.testing.assert_close(torch.cat(states, dim=1), trunk(x[:, :-1], y), rtol=1e-12, atol=1e-12)


def test_a_state_knows_the_patches_before_it_and_no_other() -> None:
    trunk = tiny().double().trunk
    x = torch.randn(1, 15, W, dtype=torch.float64, requires_grad=True)
    for n in range(16):
        (grad,) = torch.autograd.grad(trunk(x, torch.tensor([1]))[0, n].sum(), x)
        assert (grad[0, :n].abs().amax(1) > 0).all() and not grad[0, n:].any()


def test_a_masked_state_knows_what_is_not_hidden_and_no_other() -> None:
    trunk = tiny(trunk="masked").double().trunk
    x = torch.randn(2, 16, W, dtype=torch.float64, requires_grad=True)
    hidden = torch.ones(2, 16, dtype=torch.bool)
    hidden[0, [1, 6, 9]] = hidden[1, 15] = False
    (grad,) = torch.autograd.grad(trunk(x, hidden, torch.tensor([1, 3]), 4).sum(), x)
    assert torch.equal(grad.abs().amax(2) > 0, ~hidden)


def slow_loss(model: PatchAR, image: Tensor, number: Tensor, y: Tensor) -> dict[str, Tensor]:
    """The parts of one image's loss, draw by draw."""
    patches, K = patches_of(image[None])[0], model.draws_per_patch
    pieces = patches if model.codec is None else sphere(model.codec.encoder(patches))
    d = pieces.shape[1]
    level = torch.full((16, 1), model.corruption_level, dtype=torch.float64)
    if model.corruption == "mix":
        level = level * philox.uniform(SEED, number[None], philox.CORRUPTION_LEVEL, 16)[0].double()[:, None]
    kept = 1 - level if model.corruption == "mix" else 1.0
    inputs, parts = kept * pieces + level * normal(SEED, number, philox.CORRUPTION, 16, d), {}
    if model.codec is not None:
        inputs = model.codec.decoder(inputs)
        parts["reconstruction"] = (inputs - patches).square().mean()
    told = range(16)
    if model.masked:
        u = philox.uniform(SEED, number[None], philox.MASK_RATIO, 1)[0, 0].double()
        cut = torch.distributions.Normal(0.0, 1.0).cdf(torch.tensor(-1.2, dtype=torch.float64))
        share = 1 + 0.25 * torch.special.ndtri(cut + u * (0.5 - cut))
        told = order_of(SEED, number)[: math.ceil(16 * share)]
        mask = torch.tensor([[n in told for n in range(16)]])
        z = model.trunk(inputs[None], mask, y[None], 16 - len(told))[0]
    else:
        z = model.trunk(inputs[None, :-1], y[None])[0]
    e, n_t = normal(SEED, number, philox.NOISE, 16, K, d), normal(SEED, number, philox.TIME, 16, K)
    total = torch.zeros((), dtype=torch.float64)
    for n in told:
        for k in range(K):
            t = torch.sigmoid(X.time_mean + X.time_std * n_t[n, k]).float().double()
            u = t * pieces[n] + (1 - t) * X.noise_scale * e[n, k]
            x = model.head(u[None], t[None], z[n][None])[0]
            total = total + ((x - pieces[n]) / max(1 - t, X.t_eps)).square().mean()
    return {"flow": total / (len(told) * K), **parts}


@pytest.mark.parametrize("name", VARIANTS)
def test_the_loss_is_that_of_a_loop_over_draws(name: str) -> None:
    changes = dict(corruption="add", corruption_level=0.3) if "pixel" in name else {}
    model = tiny(**VARIANTS[name], **changes, draws_per_patch=2).double()
    images = torch.randint(0, 256, (2, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    y = torch.tensor([3, 1])
    with torch.no_grad():
        found = model(images, y, NUMBERS, SEED, X)
        for i in range(2):
            for part, wanted in slow_loss(model, images[i], NUMBERS[i], y[i]).items():
                torch.testing.assert_close(found[part][i].double(), wanted, rtol=2e-5, atol=1e-6)


class Losses(nn.Module):
    """The weighted sum of the parts, as a function of images."""

    def __init__(self, model: PatchAR) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return sum(self.model(images, torch.tensor([3, 1]), NUMBERS, SEED, X).values())


@pytest.mark.parametrize("name", ["causal, pixel", "masked, mlp", "causal, bottleneck"])
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    model = tiny(**VARIANTS[name]).double()
    images = torch.randint(0, 256, (2, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    if model.codec is None:
        check_gradient(Losses(model), (images,), torch.tensor([0.5, 2.0]))
        return
    # the target of the flow is no function of the codec there, as a difference would have it
    Losses(model)(images).sum().backward()
    flow, both = copy.deepcopy(model), model
    flow.zero_grad()
    flow(images, torch.tensor([3, 1]), NUMBERS, SEED, X)["flow"].sum().backward()
    assert flow.codec.encoder[0].weight.grad.abs().max() > 0  # by way of what the trunk reads
    assert torch.equal(flow.head.leave.weight.grad, both.head.leave.weight.grad)
    assert not torch.equal(flow.codec.decoder[0].weight.grad, both.codec.decoder[0].weight.grad)


@pytest.mark.parametrize("body", ["native", "triton"])
@pytest.mark.parametrize("name", ["causal, mlp", "causal, pixel"])
def test_every_body_of_the_operators_gives_the_same(name: str, body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(**VARIANTS[name], draws_per_patch=1)
    images = torch.randint(0, 256, (2, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))

    def gradients(body: str) -> list[Tensor]:
        monkeypatch.setenv("PIXELGEN_OPS", body)
        model.zero_grad()
        Losses(model)(images).sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    for found, wanted in zip(gradients(body), gradients("reference"), strict=True):
        assert float((found - wanted).norm()) <= 1e-4 * float(wanted.norm()) + 1e-6


def test_no_temperature_draws_one_image_of_a_class() -> None:
    model = tiny().eval()
    with torch.no_grad():
        drawn = model.draw(torch.tensor([1, 1, 2]), torch.arange(3), Sampling(steps=2, temperature=0.0), X, int)
    torch.testing.assert_close(drawn[0], drawn[1])
    assert not torch.allclose(drawn[0], drawn[2], atol=1e-3)


def test_a_head_begins_at_zero_with_the_loss_that_this_gives() -> None:
    """x^ = 0 makes the loss of loss = x the mean square of the patches, whatever the draws."""
    images = torch.randint(0, 256, (2, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    wanted = patches_of(images).square().mean(dim=(1, 2)).float()
    for variant in ({}, PIXEL):
        model = tiny(randomise=False, **variant)
        found = model(images, LABELS, NUMBERS, SEED, Objective(predict="x", loss="x"))["flow"]
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(dropout=0.1), "model.dropout is 0.1; model.trunk=causal has no use for it"),
        (dict(mask_low=0.5), "model.mask_low is 0.5; model.trunk=causal has no use for it"),
        (dict(pixel_channels=8), "model.pixel_channels is 8; model.head=mlp has no use for it"),
        (dict(PIXEL, head_bottleneck=8), "model.head_bottleneck is 8; model.head=pixel has no use for it"),
        (dict(PIXEL, bottleneck=8), "model.bottleneck 8 leaves no pixels for model.head=pixel"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        tiny(**changes)


def test_passes_are_of_a_masked_trunk() -> None:
    tiny(trunk="masked").check_settings(X, Sampling(passes=8, temperature=0.5))
    with pytest.raises(cfg.ConfigError, match="sample.passes is 8; patch_ar has no use for it"):
        tiny().check_settings(X, Sampling(passes=8))


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("patch_ar_b_256", 219_734_016), ("patch_ar_l_256", 493_556_992), ("patch_ar_h_256", 961_257_984)],
)
def test_sizes(name: str, parameters: int) -> None:
    """Counted once, on the meta device; configurations and README say them."""
    config = cfg.load(CONFIGS / f"{name}.yaml", [], models.model_schema)
    with torch.device("meta"):
        model = patch_ar.build(config.model, 256, 1000)
    assert sum(p.numel() for p in model.parameters()) == parameters
