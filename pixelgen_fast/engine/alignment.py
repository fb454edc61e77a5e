"""Feature alignment (REPA, arXiv 2410.06940): the generator's patch tokens, projected, follow a frozen teacher's.

    loss_b = mean over tokens of 1 - cos(projector(tokens of the noised image), teacher's tokens of the clean image)

projector   mlp    Linear D -> H, SiLU, Linear H -> H, SiLU, Linear H -> D', as PixelDiT has it (arXiv 2511.20645)
            conv   a 3 x 3 convolution D -> D' over the grid of tokens, which passes on where things are (iREPA, arXiv
                   2512.10794)
            none   the tokens themselves: a DINO student that reads noised images is trained so
spatial     f <- (f - a mean f) / (deviation of f + 1e-6), both over the tokens of an image and for each feature, with
norm a      which iREPA takes from the teacher what all tokens have in common
stop        the loss is 0 for the images of a run from `stop` on, since what it gives early it costs late (HASTE, arXiv
            2505.16792); micro-batches that have no other images run without the teacher

The projector is trained and saved with the generator, but neither averaged nor part of what generates.

Shapes: B images, L tokens of the generator on a square grid, D its width; L', D' those of the teacher; H hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import isqrt

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from pixelgen_fast import config as cfg
from pixelgen_fast.data.image_index import ImageIndex
from pixelgen_fast.dino.network import load_dino
from pixelgen_fast.dino.teacher import Teacher
from pixelgen_fast.engine.features import FeatureCache
from pixelgen_fast.engine.metrics import Stopwatch
from pixelgen_fast.errors import InputError
from pixelgen_fast.models.system import BaseSystem

Targets = Callable[[Tensor, Tensor], Tensor]


class FeatureAlignment(nn.Module):
    """forward(tokens [B, L, D], images uint8 [B, S, S, 3], numbers int64 [B]) -> loss of each image, float32 [B].

    Without tokens, for images from `stop` on, it gives zeros, which leave a gradient of zero in the projector.

    targets: (images, numbers) -> the teacher's features [B, L', D']. It is kept out of the module's children, so that
    the teacher is neither sharded, trained, cast nor saved. projector: [B, L', D] -> [B, L', D'].
    layer: the tap that gives the tokens, width: D. weight: of the loss. stop, spatial_norm: see above, None for none.
    stopwatch: time spent in `targets`.
    """

    def __init__(
        self,
        targets: Targets,
        projector: nn.Module,
        *,
        width: int,
        layer: int,
        weight: float,
        device: torch.device,
        spatial_norm: float | None = None,
        stop: int | None = None,
    ) -> None:
        super().__init__()
        self.layer, self.weight, self.width = layer, weight, width
        self.spatial_norm, self.stop = spatial_norm, stop
        self.projector = projector
        self.stopwatch = Stopwatch(device)
        self._targets = (targets,)  # a module that is an attribute would become a child

    def forward(self, tokens: Tensor | None, images: Tensor, numbers: Tensor) -> Tensor:
        if tokens is None:
            return self._nothing(numbers)
        with self.stopwatch:
            features = self.targets(images, numbers)
        if self.spatial_norm is not None:
            features = normalise_over_tokens(features, self.spatial_norm)
        loss_B = alignment_loss(self.projector(resize_tokens(tokens, features.shape[1])), features)
        return loss_B if self.stop is None else torch.where(numbers < self.stop, loss_B, 0.0)

    @torch.no_grad()
    def targets(self, images: Tensor, numbers: Tensor) -> Tensor:
        """The teacher's features of the images [B, L', D']."""
        return self._targets[0](images, numbers)

    def acts_at(self, first: int) -> bool:
        """Whether the loss acts on any image from this number on."""
        return self.stop is None or first < self.stop

    def share(self, first: int, last: int) -> float:
        """The share of the images [first, last) of a run on which the loss acts."""
        stop = last if self.stop is None else min(max(self.stop, first), last)
        return (stop - first) / (last - first)

    def _nothing(self, numbers: Tensor) -> Tensor:
        """Zeros [B], with a gradient of zero for every weight: ranks reduce it in every step, and one of them may still
        align in a step in which another does not."""
        zeros, like = torch.zeros(len(numbers), device=numbers.device), next(self.projector.parameters(), None)
        if like is None:
            return zeros
        empty = torch.zeros(1, 1, self.width, dtype=like.dtype, device=like.device)
        return zeros + 0.0 * self.projector(empty).float().sum()


class ConvProjector(nn.Module):
    """A 3 x 3 convolution over tokens on a square grid, beyond whose border all is 0. [B, L, D] -> [B, L, D']."""

    def __init__(self, width: int, features: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, features, kernel_size=3, padding=1)

    def forward(self, tokens: Tensor) -> Tensor:
        grid = rearrange(tokens, "B (h w) D -> B D h w", h=isqrt(tokens.shape[1]))
        return rearrange(self.conv(grid), "B D h w -> B (h w) D")


def make_projector(kind: str, width: int, features: int, hidden: int) -> nn.Module:
    """The projector that `alignment.projector` names. hidden: of an mlp."""
    if kind == "none":
        return nn.Identity()
    if kind == "conv":
        return ConvProjector(width, features)
    return nn.Sequential(
        nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, features)
    )


def normalise_over_tokens(features: Tensor, share: float) -> Tensor:
    """Features [B, L, D] without a share of their mean over L, over their deviation; in float32 or wider."""
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    variance, mean = torch.var_mean(features, dim=1, keepdim=True, correction=0)
    return (features - share * mean) / (variance.sqrt() + 1e-6)


def alignment_loss(projected: Tensor, features: Tensor) -> Tensor:
    """Mean over tokens of 1 - cos, computed in float32 or wider: [B, L', D'] twice -> [B]."""
    wide = torch.promote_types(projected.dtype, torch.float32)
    return (1 - F.cosine_similarity(projected.to(wide), features.to(wide), dim=-1)).mean(dim=1)


def resize_tokens(tokens: Tensor, count: int) -> Tensor:
    """Tokens of a square grid [B, L, D] on a square grid of `count`: averages to a smaller, bilinear to a larger."""
    have, want = isqrt(tokens.shape[1]), isqrt(count)
    if have == want:
        return tokens
    grid = rearrange(tokens, "B (h w) D -> B D h w", h=have)
    smaller = want < have
    grid = F.adaptive_avg_pool2d(grid, want) if smaller else F.interpolate(grid, (want, want), mode="bilinear")
    return rearrange(grid, "B D h w -> B (h w) D")


def build_alignment(
    config: cfg.Config, model: BaseSystem, index: ImageIndex | None, device: torch.device
) -> FeatureAlignment | None:
    """The alignment of a run, its projector a function of run.seed alone; None when alignment.teacher is null.

    index: of the images, for alignment.cache; None where that is null.
    Raises InputError for a layer that the model does not have and tokens of another width than a teacher that they
    should equal, and what `load_dino` and `FeatureCache` raise.
    """
    a = config.alignment
    if a.teacher is None:
        return None
    _check_layer(model, a.layer)
    width = model.tap_width(a.layer)
    teacher = Teacher(load_dino(a.teacher, a.weights), model.grid, device, compile=a.compile)
    if a.projector == "none" and width != teacher.width:
        raise InputError(
            f"alignment.projector is none, but the tokens at alignment.layer {a.layer} are {width} wide and those of "
            f"{a.teacher} {teacher.width}; use alignment.projector=mlp"
        )
    if a.cache is None:
        targets: Targets = partial(_uncached, teacher)
    else:
        assert index is not None
        d = config.data
        targets = FeatureCache(
            a.cache,
            teacher,
            index,
            seed=config.run.seed,
            size=d.image_size,
            crop=d.crop,
            class_balanced=d.class_balanced,
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        projector = make_projector(a.projector, width, teacher.width, a.projector_hidden or model.hidden_size)
    return FeatureAlignment(
        targets,
        projector,
        width=width,
        layer=a.layer,
        weight=a.weight,
        device=device,
        spatial_norm=a.spatial_norm,
        stop=a.stop_images,
    )


def _uncached(teacher: Teacher, images: Tensor, numbers: Tensor) -> Tensor:
    return teacher(images)


def _check_layer(model: BaseSystem, layer: int) -> None:
    if not model.first_tap <= layer <= model.tap_depth:
        student = "" if model.first_tap == 0 else " and no DINO student"
        raise InputError(
            f"alignment.layer is {layer} and the model has {model.tap_depth} patch blocks{student}; "
            f"set alignment.layer from {model.first_tap} to {model.tap_depth}"
        )
