"""FractalGen: an image drawn by levels, each of which draws the patches of a crop by the level inside (2502.17437).

    level 0     the image, told embed(y), has L_0 patches of p_0 pixels a side
    level l     a patch of level l - 1 is its crop, told z of that patch (masked: and of its neighbours)
    pixels      a patch of one pixel: red, green, blue by cross-entropy (fractal_pixel.py)
    loss        cross-entropy of the pixels, and of the guiding pixel (the mean color) of every crop inside

In training every level sees the real patches, and only masked ones go down to the next (masked generator), or all of
them (causal). The loss of an image is a sum over what went down, divided by the mean of how much that is. So it is a
function of (seed, image number) alone, and its mean over many images is the published mean over all their pixels.
fractal_levels.py has the levels, fractal_sampler.py draws.
Shapes: B images, M crops of a level, L patches, V = 256 values; a row counts the crops of a level over the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from einops import rearrange
from pixelgen_kernels import philox
from torch import Tensor, nn

from pixelgen_fast.config import Objective, Sampling
from pixelgen_fast.errors import InputError
from pixelgen_fast.layers import small_, xavier_
from pixelgen_fast.models import system
from pixelgen_fast.models.fractal_levels import CausalGenerator, MaskedGenerator
from pixelgen_fast.models.fractal_masks import Masks, by_crop, crop_counts, mean_hidden, mean_masks
from pixelgen_fast.models.fractal_pixel import PixelNetwork, normalise, pixel_loss, to_values
from pixelgen_fast.models.fractal_sampler import Drawing
from pixelgen_fast.models.system import SequentialSystem, depth_setting, width_setting
from pixelgen_fast.settings import above, at_least, within

Chosen = tuple[Tensor | None, Tensor | None]
Choose = Callable[[int, Tensor], Chosen]


@dataclass
class Level:
    """A level inside the patches of the one before. passes: over a crop when it is drawn, if it is masked."""

    patch_size: int = width_setting(1)
    hidden_size: int = width_setting(192)
    num_heads: int = width_setting(3)
    depth: int = depth_setting(3)
    passes: int = above(0, default=16, most=100_000)


@dataclass
class Settings(system.Settings):
    """Size of a FractalGen; hidden_size, num_heads, depth and patch_size are those of level 0.

    The defaults are FractalMAR-B for 256 pixels. The passes of level 0 are those of sampling.
    """

    system: str = "fractal"
    hidden_size: int = 768
    num_heads: int = 12
    depth: int = depth_setting(24)
    patch_size: int = 16
    generator: Literal["masked", "causal"] = "masked"
    # the levels inside; the patch of the last is one pixel
    inner: list[Level] = field(default_factory=lambda: [Level(4, 384, 6, 6), Level(1, 192, 3, 3)])
    # of the network that draws the colors of a pixel
    pixel_hidden_size: int = width_setting(64)
    pixel_num_heads: int = width_setting(4)
    pixel_depth: int = depth_setting(1)
    # whether a masked level inside draws the mean color of its crop first
    guiding_pixel: bool = True
    # of attention and feed-forward layers of the levels, not of the pixels
    dropout: float = within(0, 1, open_high=True, default=0.1)
    # deviation of what is added to a mean color, in 0 to 255, before it is rounded
    rounding_noise: float = at_least(0, default=0.01)
    # how much red, the first color, counts in the loss
    red_weight: float = above(0, default=5.0)
    # guidance does not lead to values less probable than this only because they are rarer without a class
    filter_threshold: float = within(0, 1, default=1e-4)


class Predicted(NamedTuple):
    """Logits float32 [M, 3, V] of the colors of crops, and their values int64 [M, 3].

    rows: int64 [M], which crops, among all of their level. level: of the crop, that behind the last being pixels.
    """

    level: int
    rows: Tensor
    logits: Tensor
    values: Tensor


class Fractal(SequentialSystem):
    """The SequentialSystem of this module."""

    used_objective = frozenset({"class_drop"})
    used_sampling = frozenset({"guidance", "temperature", "passes", "seed", "batch"})

    def __init__(self, settings: Settings, image_size: int, num_classes: int) -> None:
        super().__init__(settings, image_size, num_classes)
        check(settings)
        s, side, above = settings, image_size, settings.hidden_size
        self.masked = s.generator == "masked"
        self.fixed_shapes = not self.masked
        if not self.masked:
            self.used_sampling = self.used_sampling - {"passes"}
        self.draws, self.rounding_noise, self.red_weight = s.dropout > 0, s.rounding_noise, s.red_weight
        self.filter_threshold, self.inner_passes = s.filter_threshold, [level.passes for level in s.inner]
        self.y_embed = nn.Embedding(num_classes + 1, above)
        self.levels = nn.ModuleList()
        for number, level in enumerate([s, *s.inner]):
            shape = (side, level.patch_size, above, level.hidden_size, level.num_heads, level.depth, s.dropout)
            if self.masked:
                self.levels.append(MaskedGenerator(*shape, guided=s.guiding_pixel and number > 0))
            else:
                self.levels.append(CausalGenerator(*shape))
            side, above = level.patch_size, level.hidden_size
        self.pixels = PixelNetwork(above, s.pixel_hidden_size, s.pixel_depth, s.pixel_num_heads)
        self.loss_weights = {"pixels": 1.0} | ({"guides": 1.0} if self.levels[-1].guide is not None else {})
        self.lengths = [level.length for level in self.levels]
        # crops of each level in an image, and how many of them a training image goes through on average
        self.crops = crop_counts(self.lengths)
        self.means = [mean_hidden(length) if self.masked else length for length in self.lengths]
        self.initialise()

    def initialise(self) -> None:
        """Xavier products with zero biases; tables, positions and the mask token of deviation 0.02."""
        xavier_(self)
        small_(self.y_embed.weight)
        for module in self.modules():
            if isinstance(module, MaskedGenerator | CausalGenerator | PixelNetwork):
                module.initialise()

    def forward(self, images: Tensor, y: Tensor, numbers: Tensor, seed: int, objective: Objective) -> dict[str, Tensor]:
        self.check_images(images)
        choose, noise = self.mean_masks, None
        if self.masked and not images.is_meta:
            choose, noise = Masks(seed, numbers, self.lengths), self.rounding(numbers, seed)
        return self.losses(images, y, choose, noise)

    def losses(self, images: Tensor, y: Tensor, choose: Choose, noise: list[Tensor] | None) -> dict[str, Tensor]:
        """The parts of the loss of each image, float32 [B]."""
        parts = {name: torch.zeros(len(images), device=images.device) for name in self.loss_weights}
        for found in self.predictions(to_units(images), y, choose, noise):
            loss_M = pixel_loss(found.logits, found.values, self.red_weight)
            loss_B = self.by_image(found, loss_M, len(images)).sum(dim=1) / math.prod(self.means[: found.level])
            name = "pixels" if found.level == len(self.levels) else "guides"
            parts[name] = parts[name] + loss_B
        return parts

    def by_image(self, found: Predicted, x_M: Tensor, images: int) -> Tensor:
        """Numbers of crops at their places in the image, 0 where there is none: [B, crops]."""
        crops = self.crops[found.level]
        return x_M.new_zeros(images * crops).index_copy(0, found.rows, x_M).view(images, crops)

    def predictions(
        self, x: Tensor, y: Tensor, choose: Choose, noise: list[Tensor] | None = None
    ) -> Iterator[Predicted]:
        """What is said of the guiding pixels of each level, and at last of pixels, told the real patches.

        x: images float32 [B, 3, S, S] in normalised units. y: int64 [B]. choose(level, rows int64 [M]) gives the mask
        bool [M, L] and which of its M L patches go down, int64, or None for all. noise: [B crops, 3] of each level.
        """
        cond = self.y_embed(y)[:, None].expand(-1, self.levels[0].conditions, -1)
        rows = torch.arange(len(x), device=x.device)
        for number, level in enumerate(self.levels):
            guide = None
            if level.guide is not None:
                guide = x.mean(dim=(2, 3))
                values = to_values(guide, 0.0 if noise is None else noise[number].index_select(0, rows))
                yield Predicted(number, rows, level.guide(cond[:, 0], values[:, :2]), values)
            p = level.patch_size
            patches = rearrange(x, "M c (h p) (w q) -> M (h w) c p q", p=p, q=p)
            masked, chosen = choose(number, rows)
            cond = level.inner(level(patches.flatten(2), masked, cond, guide)).flatten(0, 1)
            places = torch.arange(level.length, device=x.device)
            x, rows = patches.flatten(0, 1), (rows[:, None] * level.length + places).flatten()
            if chosen is not None:
                cond, x, rows = (tensor.index_select(0, chosen) for tensor in (cond, x, rows))
        values = to_values(x.flatten(1))
        yield Predicted(len(self.levels), rows, self.pixels(cond[:, 0], values[:, :2]), values)

    def mean_masks(self, depth: int, rows: Tensor) -> Chosen:
        return mean_masks(self.lengths[depth], rows) if self.masked else (None, None)

    def rounding(self, numbers: Tensor, seed: int) -> list[Tensor]:
        """What is added to mean colors before they are rounded, [B crops, 3] for each level."""
        sizes = [(crops, 3) for crops in self.crops[:-1]]
        noise = philox.normal(seed, numbers, philox.NOISE, sum(3 * crops for crops, _ in sizes))
        return by_crop(self.rounding_noise * noise, sizes)

    @torch.no_grad()
    def bits_per_dim(self, images: Tensor, y: Tensor, numbers: Tensor, seed: int) -> Tensor:
        """An unbiased estimate of the bound on -log2 p(image | y) for each color of a pixel, float32 [B].

        A causal generator gives the number itself. A masked one averages over orders of drawing: each level masks a
        number of patches uniform in 1..L. images: uint8 [B, S, S, 3]. y: int64 [B]. numbers: int64 [B], of the images.
        Raises ValueError for a model with guiding pixels, whose images have no such bound.
        """
        if "guides" in self.loss_weights:
            raise ValueError("bits_per_dim needs model.guiding_pixel false: a mean color is no part of an image")
        self.check_images(images)
        choose = Masks(seed, numbers, self.lengths, shared=True) if self.masked else self.mean_masks
        (found,) = self.predictions(to_units(images), y, choose)
        loss_M = pixel_loss(found.logits, found.values) / math.log(2)
        sums, counts = (self.by_image(found, x, len(y)).sum(dim=1) for x in (loss_M, torch.ones_like(loss_M)))
        return sums / counts

    def draw(
        self,
        labels: Tensor,
        numbers: Tensor,
        settings: Sampling,
        objective: Objective,
        before_pass: Callable[[], object],
    ) -> Tensor:
        passes = [settings.passes, *self.inner_passes]
        drawing = Drawing(self.levels, self.pixels, numbers, settings, passes, self.filter_threshold, before_pass)
        y = labels if settings.guidance == 1 else torch.cat([labels, torch.full_like(labels, self.num_classes)])
        cond = self.y_embed(y)[:, None].expand(-1, self.levels[0].conditions, -1)
        rows = torch.arange(len(labels), device=labels.device)
        return drawing.crops(0, cond, rows, settings.guidance).float() / 127.5 - 1

    def trial(self, batch: int) -> Tensor:
        side, device = self.image_size, next(self.parameters()).device
        images = torch.zeros(batch, side, side, 3, dtype=torch.uint8, device=device)
        parts = self.losses(images, torch.zeros(batch, dtype=torch.int64, device=device), self.mean_masks, None)
        return sum(loss.sum() for loss in parts.values())

    def blocks(self) -> list[nn.Module]:
        guides = [level.guide for level in self.levels if level.guide is not None]
        return [block for part in (*self.levels, *guides, self.pixels) for block in part.blocks]

    def whole_modules(self) -> list[nn.Module]:
        return self.blocks()


def to_units(images: Tensor) -> Tensor:
    """uint8 [B, S, S, 3] as float32 [B, 3, S, S] in normalised units."""
    return normalise(rearrange(images, "B H W C -> B C H W"))


def check(settings: Settings) -> None:
    """Raise InputError, naming the setting and its value, for levels that do not fit."""
    causal, side = settings.generator == "causal", settings.patch_size
    if settings.guiding_pixel and causal:
        raise InputError("model.guiding_pixel is true, but a causal generator has none; set it to false")
    for number, level in enumerate(settings.inner):
        key = f"model.inner[{number}]"
        if causal and level.passes != Level.passes:
            raise InputError(
                f"{key}.passes is {level.passes}, but a causal generator makes one for each patch; leave it out"
            )
        if level.hidden_size % level.num_heads:
            raise InputError(f"{key}.num_heads {level.num_heads} does not divide {key}.hidden_size {level.hidden_size}")
        if level.patch_size >= side or side % level.patch_size:
            raise InputError(
                f"{key}.patch_size {level.patch_size} does not divide the {side} pixels a side that it is in"
            )
        side = level.patch_size
    if side != 1:
        raise InputError(
            f"the patch of the last level has {side} pixels a side; add a level with patch_size 1 to model.inner"
        )


def build(settings: Settings, image_size: int, num_classes: int) -> Fractal:
    """The model of a configuration, with fresh weights."""
    return Fractal(settings, image_size, num_classes)
