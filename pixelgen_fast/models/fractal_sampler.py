"""How FractalGen draws (arXiv 2502.17437): a level chooses patches of a crop, and the levels inside draw them whole.

    masked   in each pass the patches that leave the mask of masking.py, the last of a random order first
    causal   patch after patch, with the keys and values of those before
    colors   red, green, blue from softmax(guided logits); logits are multiplied by the temperature: above 1 sharpens

With guidance every crop is drawn for its class and for none at once: the two see the same patches, differ in their
conditions and meet in the logits. The scale is w inside a patch, and on the first level grows with what is drawn:

    masked   1 + (w - 1) (L - max(1, hidden)) / L,  hidden after the pass     causal   1 + (w - 1) (j + 1) / L,  patch j

Every order and every color has a random number of its own, a function of (seed, number of the sample, place).
Shapes: N crops, G = 2 N with guidance or N, L patches of p p pixels, m of them in a pass, K conditions of width D'.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from einops import rearrange
from pixelgen_kernels import philox
from torch import Tensor

from pixelgen_fast.config import Sampling
from pixelgen_fast.models.fractal_levels import CausalGenerator, MaskedGenerator
from pixelgen_fast.models.fractal_masks import by_crop, crop_counts, orders
from pixelgen_fast.models.fractal_pixel import PixelNetwork, guided, normalise, pick
from pixelgen_fast.models.masking import hidden_counts

Level = MaskedGenerator | CausalGenerator
# places int64 [N, m] of patches, conditions [G m, K, D] of what is inside them, scale of guidance
Step = tuple[Tensor, Tensor, float]


class Drawing:
    """Draws samples of these numbers, int64 [B].

    passes: of each level over its crops, where it is masked. threshold: of `guided`.
    """

    def __init__(
        self,
        levels: Sequence[Level],
        pixels: PixelNetwork,
        numbers: Tensor,
        settings: Sampling,
        passes: Sequence[int],
        threshold: float,
        before_pass: Callable[[], object],
    ) -> None:
        self.levels, self.pixels, self.passes, self.threshold = levels, pixels, passes, threshold
        self.temperature, self.before_pass = settings.temperature, before_pass
        self.branches = 1 if settings.guidance == 1 else 2
        lengths = [level.length for level in levels]
        self.words = orders(settings.seed, numbers, lengths)
        sizes = [(crops, 3) for crops in crop_counts(lengths)]
        self.colors = by_crop(
            philox.uniform(settings.seed, numbers, philox.SAMPLING, sum(3 * crops for crops, _ in sizes)), sizes
        )

    def crops(self, depth: int, cond: Tensor, rows: Tensor, scale: float) -> Tensor:
        """Values 0 to 255 of crops, int64 [N, 3, S, S].

        depth: the level that they are crops of; behind the last they are pixels. cond: [G, K, D'], those of the class
        before those of none. rows: int64 [N], which crops, among all of their level.
        """
        if depth == len(self.levels):
            return self.color(self.pixels, depth, cond, rows, scale)[..., None, None]
        level, N = self.levels[depth], len(rows)
        L, p, side = level.length, level.patch_size, round(level.length**0.5)
        values = rows.new_zeros(N, L, 3, p, p)
        steps = self.masked if isinstance(level, MaskedGenerator) else self.causal
        for places, inner, inner_scale in steps(depth, cond, rows, values, scale):
            drawn = self.crops(depth + 1, inner, (rows[:, None] * L + places).flatten(), inner_scale)
            values[torch.arange(N, device=rows.device)[:, None], places] = drawn.view(*places.shape, 3, p, p)
        return rearrange(values, "N (h w) c p q -> N c (h p) (w q)", h=side)

    def masked(self, depth: int, cond: Tensor, rows: Tensor, values: Tensor, scale: float) -> Iterator[Step]:
        """The steps of a masked level; values [N, L, 3, p, p] are filled in between them."""
        level, order = self.levels[depth], self.words[depth][rows].argsort(dim=1, stable=True)
        guide = None
        if level.guide is not None:
            color = self.color(level.guide, depth, cond, rows, scale)
            guide = self.twice(normalise(color[..., None, None]).flatten(1))
        L, left = level.length, level.length
        masked = torch.ones_like(order, dtype=torch.bool)
        for hidden in hidden_counts(L, self.passes[depth]):
            places = order[:, hidden:left]
            self.before_pass()
            z = level(self.twice(normalise(values).flatten(2)), self.twice(masked), cond, guide)
            both = self.twice(places)
            inner = level.inner(z)[torch.arange(len(both), device=both.device)[:, None], both].flatten(0, 1)
            # the published schedule counts a patch as hidden to the end
            yield places, inner, self.scale(depth, scale, (L - max(hidden, 1)) / L)
            masked.scatter_(1, places, False)
            left = hidden

    def causal(self, depth: int, cond: Tensor, rows: Tensor, values: Tensor, scale: float) -> Iterator[Step]:
        """The steps of a causal level."""
        level = self.levels[depth]
        pasts, before = level.begin(len(cond)), cond[:, 0]
        for j in range(level.length):
            self.before_pass()
            z = level.extend(before, pasts)
            yield rows.new_full((len(rows), 1), j), z[:, None], self.scale(depth, scale, (j + 1) / level.length)
            before = self.twice(normalise(values[:, j]).flatten(1))

    def scale(self, depth: int, scale: float, drawn: float) -> float:
        """The scale of guidance when this share of a crop has been drawn."""
        return scale if depth else 1 + (scale - 1) * drawn

    def color(self, network: PixelNetwork, depth: int, cond: Tensor, rows: Tensor, scale: float) -> Tensor:
        """Values of the color that a network draws for each crop, int64 [N, 3]."""
        u = self.colors[depth][rows]
        values = rows.new_zeros(len(rows), 0)
        for channel in range(3):
            logits = network(cond[:, 0], self.twice(values))[:, -1] * self.temperature
            if self.branches == 2:
                logits = guided(*logits.chunk(2), scale, self.threshold)
            values = torch.cat([values, pick(logits, u[:, channel])[:, None]], dim=1)
        return values

    def twice(self, x: Tensor) -> Tensor:
        """x for the class and for none, if both are drawn."""
        return torch.cat([x] * self.branches)
