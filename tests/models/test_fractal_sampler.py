"""What FractalGen draws: the pixels of an independent slow implementation, for the same random numbers."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from pixelgen_kernels import philox
from support.fractal_reference import Slow
from support.models import tiny_of

from pixelgen_fast.config import Objective, Sampling
from pixelgen_fast.interop.fractal import FORM
from pixelgen_fast.models.fractal import Fractal, Level, Settings
from pixelgen_fast.models.fractal_pixel import guided, pick

MASKED = dict(
    hidden_size=16, num_heads=2, depth=1, patch_size=4, inner=[Level(2, 8, 1, 1, passes=3), Level(1, 12, 3, 1)],
    pixel_hidden_size=8, pixel_num_heads=2, pixel_depth=2, filter_threshold=3e-3, dropout=0.3,
)  # fmt: skip
CAUSAL = MASKED | dict(generator="causal", guiding_pixel=False, inner=[Level(2, 8, 1, 1), Level(1, 12, 3, 2)])
SAMPLING = Sampling(guidance=2.5, temperature=1.3, passes=3, seed=7)
tiny = tiny_of("fractal")


def model_of(settings: dict) -> Fractal:
    return tiny(image_size=8, **settings).double().eval()


def draw(model: Fractal, labels: list[int], numbers: list[int], sampling: Sampling) -> np.ndarray:
    """Values 0 to 255, [N, 3, S, S]."""
    with torch.no_grad():
        x = model.draw(torch.tensor(labels), torch.tensor(numbers), sampling, Objective(), lambda: None)
    values = (x.numpy() + 1) * 127.5
    assert np.abs(values - values.round()).max() < 1e-4
    return values.round()


def slow(model: Fractal, settings: Settings, number: int, sampling: Sampling) -> Slow:
    """The reference with the random numbers of one sample: streams and order of numbers are those of the package."""
    lengths, numbers = model.lengths, torch.tensor([number])
    crops = [int(np.prod(lengths[:i])) for i in range(len(lengths) + 1)]
    sizes = [crops[i + 1] for i in range(len(lengths))]
    words = philox.words(sampling.seed, numbers, philox.MASK_ORDER, sum(sizes))[0].numpy()
    colors = philox.uniform(sampling.seed, numbers, philox.SAMPLING, 3 * sum(crops))[0].double().numpy()
    levels = [settings, *settings.inner]
    return Slow(
        weights=FORM.to_public(model.state_dict(), settings),
        sides=[model.image_size, *(level.patch_size for level in levels)],
        heads=[*(level.num_heads for level in levels), settings.pixel_num_heads],
        kind={"masked": "mar", "causal": "ar"}[settings.generator],
        passes=[sampling.passes, *(level.passes for level in settings.inner)],
        words=[part.reshape(n, -1) for part, n in zip(np.split(words, np.cumsum(sizes)[:-1]), crops, strict=False)],
        colors=[part.reshape(-1, 3) for part in np.split(colors, 3 * np.cumsum(crops)[:-1])],
        guidance=sampling.guidance,
        temperature=sampling.temperature,
        threshold=settings.filter_threshold,
    )


@pytest.mark.parametrize(
    ("kind", "guidance"),
    [(MASKED, 2.5), (MASKED | dict(guiding_pixel=False), 1.0), (CAUSAL, 2.5)],
    ids=["guiding pixel", "masked", "causal"],
)
def test_the_pixels_are_those_of_a_slow_implementation(kind: dict, guidance: float) -> None:
    """No cache, no batch, no shared code: the same image for the same random numbers."""
    model, sampling = model_of(kind), replace(SAMPLING, guidance=guidance)
    labels, numbers = [2, 0], [5, 2**33]
    drawn = draw(model, labels, numbers, sampling)
    for image, label, number in zip(drawn, labels, numbers, strict=True):
        assert np.array_equal(image, slow(model, Settings(**kind), number, sampling).image(label))
    assert drawn.std() > 20


@pytest.mark.parametrize("kind", [MASKED, CAUSAL], ids=["masked", "causal"])
def test_a_sample_does_not_depend_on_its_batch(kind: dict) -> None:
    model = model_of(kind)
    whole = draw(model, [0, 1, 2, 1], [4, 9, 1, 7], SAMPLING)
    assert np.array_equal(draw(model, [1, 1], [7, 9], SAMPLING), whole[[3, 1]])
    assert not np.array_equal(draw(model, [1], [8], SAMPLING), whole[3:])


def test_the_bits_of_a_causal_generator_are_those_of_what_it_draws() -> None:
    model, settings, sampling = model_of(CAUSAL), Settings(**CAUSAL), Sampling(seed=3)
    reference = slow(model, settings, 6, sampling)
    image = reference.image(1)
    uint8 = torch.tensor(image.transpose(1, 2, 0), dtype=torch.uint8)[None]
    found = model.bits_per_dim(uint8, torch.tensor([1]), torch.tensor([0]), 0)
    assert float(found) == pytest.approx(reference.nats / np.log(2) / image.size, rel=1e-6)


def test_a_value_is_as_frequent_as_it_is_probable() -> None:
    logits = torch.tensor([0.0, 1.0, -20.0, 2.0])
    u = (torch.arange(100_000) + 0.5) / 100_000
    counts = torch.bincount(pick(logits.expand(len(u), -1), u), minlength=4) / len(u)
    torch.testing.assert_close(counts, logits.softmax(0), rtol=0, atol=2e-5)


def test_guidance_does_not_lead_to_what_is_only_rarer_without_a_class() -> None:
    cond, none = torch.tensor([[5.0, 4.0, -9.0]]), torch.tensor([[5.0, 4.0, -30.0]])
    plain, filtered = guided(cond, none, 3.0, 0.0), guided(cond, none, 3.0, 1e-3)
    assert plain[0, 2] > plain[0, 0]  # led to a value of probability 6e-7
    assert torch.equal(filtered, cond)
    assert torch.equal(guided(cond, none + 1, 1.0, 1e-3), cond)
