"""MAR: published sizes, and its sampler against a slow one that draws token by token with formulas of its own."""

import math

import pytest
import torch
from pixelgen_kernels import philox
from support.models import tiny_of
from torch import Tensor

from pixelgen_fast import config as cfg
from pixelgen_fast.config import Objective, Sampling
from pixelgen_fast.errors import InputError
from pixelgen_fast.models import mar
from pixelgen_fast.models.mar import Mar

tiny = tiny_of("mar")
LATENTS = dict(patch_size=1, channels=16)


@pytest.mark.parametrize(
    ("size", "parameters", "head"),
    [
        (dict(), 207_924_768, 35_749_920),
        (dict(hidden_size=1024, num_heads=16, depth=16, head_width=1280, head_depth=8), 478_326_304, 72_230_432),
        (dict(hidden_size=1280, num_heads=16, depth=20, head_width=1536, head_depth=12), 942_403_104, 151_206_944),
    ],
)
def test_published_parameter_counts(size: dict, parameters: int, head: int) -> None:
    with torch.device("meta"):
        model = mar.build(mar.Settings(**LATENTS, **size), 16, 1000)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert sum(p.numel() for p in model.head.parameters()) == head


def normal(seed: int, number: int, stream: int, *shape: int) -> Tensor:
    return philox.normal(seed, torch.tensor([number]), stream, math.prod(shape)).double().view(shape)


def abar(t: int) -> float:
    """The product of 1 - beta up to step t."""

    def f(t: int) -> float:
        return math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2

    return math.prod(1 - min(0.999, 1 - f(k + 1) / f(k)) for k in range(t + 1))


def slow_token(model: Mar, number: int, place: int, z: Tensor, z_null: Tensor, w: float, s: Sampling) -> Tensor:
    """A token by the posterior of each kept step, its variance between the two bounds that the network chooses from."""
    kept = [round(i * 999 / (s.steps - 1)) for i in range(s.steps)]
    u = normal(s.seed, number, philox.SAMPLING, model.length, model.width)[place]
    for i in reversed(range(s.steps)):
        now, before = abar(kept[i]), abar(kept[i - 1]) if i else 1.0
        beta = 1 - now / before
        out, out_null = (model.head(u[None], torch.tensor([kept[i]]), state[None])[0] for state in (z, z_null))
        e, e_null, r = out[: model.width], out_null[: model.width], out[model.width :]
        e = e_null + w * (e - e_null)
        x = u / math.sqrt(now) - math.sqrt(1 / now - 1) * e
        mean = (beta * math.sqrt(before) * x + (1 - before) * math.sqrt(now / before) * u) / (1 - now)
        if not i:
            return mean
        low = beta * (1 - before) / (1 - now)
        deviation = torch.exp(((r + 1) / 2 * math.log(beta) + (1 - r) / 2 * math.log(low)) / 2)
        noise = normal(s.seed, number * model.length + place, philox.SAMPLING_STEPS + i, model.width)
        u = mean + s.temperature * deviation * noise
    raise AssertionError


def slow_draw(model: Mar, number: int, label: int, s: Sampling) -> Tensor:
    """The tokens of one sample [L, d]."""
    L, words = model.length, philox.words(s.seed, torch.tensor([number]), philox.MASK_ORDER, model.length)[0].tolist()
    hidden, passes = sorted(range(L), key=lambda n: (words[n], n)), min(s.passes, L)
    tokens = torch.zeros(L, model.width, dtype=torch.float64)
    for done in range(1, passes + 1):
        left = max(1, min(len(hidden) - 1, math.floor(L * math.cos(math.pi / 2 * done / passes))))
        left = 0 if done == passes else left
        mask = torch.tensor([[n in hidden for n in range(L)]])
        z, z_null = (
            model.trunk(tokens[None], mask, torch.tensor([y]), L - len(hidden))[0] for y in (label, model.num_classes)
        )
        w = 1 + (s.guidance - 1) * (L - left) / L
        for n in hidden[left:]:
            tokens[n] = slow_token(model, number, n, z[n], z_null[n], w, s)
        hidden = hidden[:left]
    return tokens


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_a_sample_is_that_of_a_slow_sampler(guidance: float) -> None:
    model = tiny().double().eval()
    settings = Sampling(steps=4, guidance=guidance, temperature=0.8, passes=5, seed=4)
    numbers, labels = [5, 2**33], [2, 0]
    with torch.no_grad():
        found = model.draw_tokens(torch.tensor(labels), torch.tensor(numbers), settings)
        for i in range(2):
            wanted = slow_draw(model, numbers[i], labels[i], settings)
            torch.testing.assert_close(found[i].double(), wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


def test_images_are_their_tokens() -> None:
    """A token's numbers are those of a colour, row by row, then the next colour's."""
    model = tiny()
    x = torch.arange(3 * 16 * 16.0).view(1, 3, 16, 16)
    tokens = model.tokens(x)
    assert torch.equal(model.image(tokens), x)
    assert torch.equal(tokens[0, 6].view(3, 4, 4), x[0, :, 4:8, 8:12])


def test_a_latent_model_draws_latents_and_says_that_they_are_no_images() -> None:
    model = tiny(patch_size=4, channels=5)
    with torch.no_grad():
        drawn = model.draw_tokens(torch.tensor([1]), torch.tensor([0]), Sampling(steps=2, passes=2))
    assert model.image(drawn).shape == (1, 5, 16, 16)
    for call in (
        lambda: model.draw(torch.tensor([1]), torch.tensor([0]), Sampling(steps=2), Objective(), int),
        lambda: model.trial(1),
    ):
        with pytest.raises(InputError, match="model.channels is 5: this MAR knows latents"):
            call()


def test_settings_of_flows_are_refused() -> None:
    model = tiny()
    for objective, sampling, said in (
        (Objective(predict="x"), Sampling(), "objective.predict is x"),
        (Objective(), Sampling(solver="heun"), "sample.solver is heun"),
        (Objective(), Sampling(shift=3.0), "sample.shift is 3.0"),
    ):
        with pytest.raises(cfg.ConfigError, match=f"{said}; mar has no use for it"):
            model.check_settings(objective, sampling)


def test_heads_of_the_decoder_divide_its_width() -> None:
    with pytest.raises(InputError, match="model.decoder_num_heads 5 does not divide model.decoder_hidden_size 24"):
        tiny(decoder_num_heads=5)
