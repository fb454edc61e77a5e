"""FractalGen: published sizes, what training draws, its loss, the bound on an image's bits, and what is refused."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from scipy import stats
from support.models import TINY, tiny_of
from torch import Tensor

from pixelgen_fast.config import Objective
from pixelgen_fast.engine.metrics import forward_flops
from pixelgen_fast.models import fractal
from pixelgen_fast.models.fractal import Level, Settings
from pixelgen_fast.models.fractal_masks import Masks, mean_hidden
from pixelgen_fast.models.fractal_pixel import normalise, pixel_loss, to_values

IN64 = dict(
    hidden_size=1024, num_heads=16, depth=32, patch_size=4, inner=[Level(1, 512, 8, 8)], pixel_hidden_size=128,
    pixel_depth=3, guiding_pixel=False,
)  # fmt: skip
B = dict()
L = dict(hidden_size=1024, num_heads=16, depth=32, inner=[Level(4, 512, 8, 8), Level(1, 256, 4, 4)])
H = dict(hidden_size=1280, num_heads=16, depth=40, inner=[Level(4, 640, 8, 10), Level(1, 320, 4, 5)])
tiny = tiny_of("fractal")
NUMBERS = torch.arange(3000)


def images(count: int, side: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, 256, (count, side, side, 3), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize(
    ("size", "pixels", "parameters", "millions"),
    [
        (IN64 | dict(generator="causal"), 64, 442_068_224, [413.50, 27.81, 0.76]),
        (IN64, 64, 431_995_648, [405.48, 25.76, 0.76]),
        (B, 256, 186_300_224, [172.26, 10.97 + 0.79, 1.42 + 0.74, 0.11]),
        (L, 256, 437_000_064, [406.21, 25.78 + 0.83, 3.30 + 0.76, 0.12]),
        (H, 256, 849_586_240, [791.34, 50.11 + 0.86, 6.38 + 0.78, 0.12]),
    ],
    ids=["causal 64", "masked 64", "B", "L", "H"],
)
def test_published_parameter_counts(size: dict, pixels: int, parameters: int, millions: list[float]) -> None:
    with torch.device("meta"):
        model = fractal.build(Settings(**size), pixels, 1000)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == parameters
    # the published first level counts the classes
    parts = [sum(p.numel() for p in part.parameters()) for part in (*model.levels, model.pixels)]
    parts[0] += model.y_embed.weight.numel()
    for found, expected in zip(parts, millions, strict=True):
        assert found / 1e6 == pytest.approx(expected, abs=0.011)


def test_the_defaults_are_the_published_b() -> None:
    assert Settings() == Settings(hidden_size=768, num_heads=12, depth=24, patch_size=16, guiding_pixel=True,
                                  inner=[Level(4, 384, 6, 6, 16), Level(1, 192, 3, 3, 16)])  # fmt: skip


@pytest.mark.parametrize("length", [4, 16, 256])
def test_training_hides_as_many_patches_as_a_truncated_normal_says(length: int) -> None:
    law = stats.truncnorm(-4, 0, loc=1, scale=0.25)
    masked, chosen = Masks(3, NUMBERS, [length])(0, NUMBERS)
    counts = masked.sum(1)
    assert counts.min() >= 1 and len(chosen) == counts.sum()
    assert torch.equal(torch.zeros_like(masked.flatten()).index_fill(0, chosen, True).view_as(masked), masked)
    expected = [law.cdf(k / length) - law.cdf((k - 1) / length) for k in range(1, length + 1)]
    # counts that are expected less than ten times are taken together
    rare = torch.tensor(expected) * len(NUMBERS) < 10
    found = torch.bincount(counts, minlength=length + 1)[1:]
    wanted = torch.tensor(expected) * len(NUMBERS)
    pairs = [(found[~rare], wanted[~rare]), (found[rare].sum()[None], wanted[rare].sum()[None])]
    f, w = (torch.cat(part) for part in zip(*pairs, strict=True))
    assert stats.chisquare(f[w > 0], w[w > 0] * f.sum() / w.sum()).pvalue > 1e-3
    mean = sum(k * p for k, p in enumerate(expected, start=1))
    assert mean_hidden(length) == pytest.approx(mean, rel=1e-9)
    # every patch is hidden as often as every other
    share = masked.float().mean(0)
    assert float((share - mean / length).abs().max()) < 5 * 0.5 / len(NUMBERS) ** 0.5


def test_the_mask_of_a_crop_is_its_own() -> None:
    """It does not depend on which crops are met with it, nor on the batch; crops of an image differ."""
    lengths, numbers = [16, 16], torch.tensor([3, 8, 5])
    whole = Masks(1, numbers, lengths)(1, torch.arange(48))[0].view(3, 16, 16)
    assert torch.equal(Masks(1, numbers[1:2], lengths)(1, torch.tensor([2, 9]))[0], whole[1, [2, 9]])
    assert len({tuple(row.tolist()) for row in whole.flatten(0, 1)}) > 20
    assert not torch.equal(Masks(2, numbers, lengths)(1, torch.arange(48))[0].view(3, 16, 16), whole)


def test_the_loss_is_over_what_goes_down_divided_by_its_mean() -> None:
    """So the mean over images is the published mean over pixels, up to the number that the masks of a batch give."""
    model, x, y = tiny(inner=[Level(2, 16, 2, 1), Level(1, 16, 2, 1)]), images(4), torch.tensor([0, 1, 2, 3])
    numbers = torch.tensor([4, 9, 2, 7])
    parts = model(x, y, numbers, 11, Objective())
    units = normalise(x.movedim(3, 1))
    stages = list(model.predictions(units, y, Masks(11, numbers, [16, 4, 4]), model.rounding(numbers, 11)))
    losses = [pixel_loss(stage.logits, stage.values, 5.0) for stage in stages]
    assert [stage.level for stage in stages] == [1, 2, 3]
    means = [mean_hidden(16), mean_hidden(16) * mean_hidden(4), mean_hidden(16) * mean_hidden(4) ** 2]
    sums = [loss.sum() / mean for loss, mean in zip(losses, means, strict=True)]
    torch.testing.assert_close(parts["guides"].sum(), sums[0] + sums[1])
    torch.testing.assert_close(parts["pixels"].sum(), sums[2])
    last = stages[-1]
    pixels = x.view(-1, 3)  # a row is a pixel in the order of patches in patches
    order = torch.arange(256).view(4, 4, 4, 4).permute(0, 2, 1, 3).reshape(16, 2, 2, 2, 2).permute(0, 1, 3, 2, 4)
    assert torch.equal(last.values, pixels.view(4, 256, 3)[:, order.flatten()].reshape(-1, 3)[last.rows].long())


def test_every_color_of_an_image_comes_back() -> None:
    values = torch.arange(256)[:, None].expand(-1, 3)
    assert torch.equal(to_values(normalise(values[..., None, None]).flatten(1)), values)
    assert set(to_values(torch.full((1000, 3), 0.0), torch.randn(1000, 3))[:, 0].tolist()) > {123, 124}


def test_red_counts_for_more() -> None:
    logits, values = torch.randn(6, 3, 256), torch.randint(0, 256, (6, 3))
    red, green, blue = logits.log_softmax(-1).neg().gather(2, values[..., None])[..., 0].unbind(1)
    torch.testing.assert_close(pixel_loss(logits, values, 5.0), (5 * red + green + blue) / 7)
    torch.testing.assert_close(pixel_loss(logits, values), (red + green + blue) / 3)


def test_the_bound_on_the_bits_of_an_image_averages_over_all_masks() -> None:
    """Of 2 x 2 pixels: the mean over counts 1 to 4 and over all sets of so many, against the mean of many estimates."""
    model = tiny(image_size=2, patch_size=1, inner=[], guiding_pixel=False).double().eval()
    x, y = images(1, side=2), torch.tensor([1])

    def exactly(hidden: tuple[int, ...]) -> Callable[[int, Tensor], tuple[Tensor, Tensor]]:
        masked = torch.zeros(1, 4, dtype=torch.bool).index_fill(1, torch.tensor(hidden), True)
        return lambda depth, rows: (masked, torch.tensor(hidden))

    with torch.no_grad():
        bits = 0.0
        for count in range(1, 5):
            sets = list(itertools.combinations(range(4), count))
            for hidden in sets:
                (found,) = model.predictions(normalise(x.movedim(3, 1)), y, exactly(hidden))
                bits += float(pixel_loss(found.logits, found.values).mean()) / len(sets) / 4 / math.log(2)
    estimates = model.bits_per_dim(x.expand(2000, -1, -1, -1), y.expand(2000), torch.arange(2000), 5)
    assert float(estimates.mean()) == pytest.approx(bits, abs=4 * float(estimates.std()) / 2000**0.5)
    torch.testing.assert_close(model.bits_per_dim(x, y, torch.tensor([7]), 5), estimates[7:8])
    with pytest.raises(ValueError, match="guiding_pixel false"):
        tiny().bits_per_dim(images(1), y, torch.tensor([0]), 0)


def test_a_pass_is_counted_without_numbers() -> None:
    """A trial reads shapes alone, on the meta device as on any other, and hides as much as training does on average."""
    model = tiny()
    with torch.device("meta"):
        there = forward_flops(fractal.build(Settings(**TINY["fractal"]), 16, 3))
    assert forward_flops(model) == there > 0
    assert forward_flops(tiny(generator="causal", guiding_pixel=False, inner=[Level(1, 16, 2, 1)])) > 0
    assert torch.isfinite(model.trial(2)) and model.trial(2).requires_grad


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(inner=[Level(3, 16, 2, 1), Level(1, 16, 2, 1)]), r"model.inner\[0\].patch_size 3 does not divide the 4"),
        (dict(inner=[Level(4, 16, 2, 1)]), r"model.inner\[0\].patch_size 4 does not divide the 4"),
        (dict(inner=[Level(2, 16, 2, 1)]), "2 pixels a side; add a level with patch_size 1"),
        (
            dict(inner=[Level(1, 16, 3, 1)]),
            r"model.inner\[0\].num_heads 3 does not divide model.inner\[0\].hidden_size",
        ),
        (dict(pixel_num_heads=3), "hidden size 64 does not divide over 3 heads"),
        (
            dict(generator="causal", guiding_pixel=False, inner=[Level(1, 16, 2, 1, passes=3)]),
            r"model.inner\[0\].passes is 3, but a causal generator makes one for each patch",
        ),
        (dict(generator="causal"), "guiding_pixel is true, but a causal generator has none"),
    ],
)
def test_levels_that_do_not_fit_are_refused_by_name(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**changes)
