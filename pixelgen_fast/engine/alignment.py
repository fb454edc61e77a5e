"""Feature alignment (REPA, arXiv 2410.06940): the generator's patch tokens, projected, follow a frozen teacher's.

    loss_b = mean over tokens of 1 - cos(projector(tokens of the noised image), teacher's tokens of the clean image)

The projector is Linear D -> H, SiLU, Linear H -> H, SiLU, Linear H -> D', as PixelDiT has it (arXiv 2511.20645). It is
trained and saved with the generator, but neither averaged nor part of what generates. Without one the tokens themselves
follow the teacher's: a DINO student that reads noised images is trained so.

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

    targets: (images, numbers) -> the teacher's features [B, L', D']. It is kept out of the module's children, so that
    the teacher is neither sharded, trained, cast nor saved. hidden: width of the projector, None for no projector.
    layer: the tap that gives the tokens, width: D. weight: of the loss.
    stopwatch: time spent in `targets`.
    """

    def __init__(
        self,
        targets: Targets,
        *,
        width: int,
        features: int,
        hidden: int | None,
        layer: int,
        weight: float,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.layer, self.weight, self.width = layer, weight, width
        self.projector: nn.Module = nn.Identity()
        if hidden is not None:
            self.projector = nn.Sequential(
                nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, features)
            )
        self.stopwatch = Stopwatch(device)
        self._targets = (targets,)  # a module that is an attribute would become a child

    def forward(self, tokens: Tensor, images: Tensor, numbers: Tensor) -> Tensor:
        with self.stopwatch:
            features = self.targets(images, numbers)
        return alignment_loss(self.projector(resize_tokens(tokens, features.shape[1])), features)

    @torch.no_grad()
    def targets(self, images: Tensor, numbers: Tensor) -> Tensor:
        """The teacher's features of the images [B, L', D']."""
        return self._targets[0](images, numbers)


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
        return FeatureAlignment(
            targets,
            width=width,
            features=teacher.width,
            hidden=None if a.projector == "none" else a.projector_hidden or model.hidden_size,
            layer=a.layer,
            weight=a.weight,
            device=device,
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
