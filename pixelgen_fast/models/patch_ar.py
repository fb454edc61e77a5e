"""A pixel autoregressor: a transformer over patches, and a flow that draws each patch from the transformer's state.

    X_1..X_L = patches of the image in [-1, 1]           s_n = X_n, or E(X_n) of the bottleneck form
    z_n      = trunk(noised pieces that are known)       causal: those before n in raster order; masked: a random set
    u        = t s_n + (1 - t) e,   x^ = head(u, t, z_n),   K draws of (t, e) for each z_n
    loss     = mean |v(x^) - v|^2 over patches that are told, draws and numbers       (objective.predict x, loss v)

Inputs are s~ = s + b e (corruption: add) or (1 - b u) s + b u e, u uniform for each piece (mix), b = corruption_level;
when an image is drawn they are clean. In the bottleneck form the trunk reads D(s~), and "reconstruction" is
mean |D(s~) - X|^2; the flow's target s is not pulled towards what is easy to tell.

Published: the masked trunk and the MLP head, both of MAR (arXiv 2406.11838), there on latents; the raster trunk, the
flow head, K draws and guidance that grows with the position, of SphereAR (arXiv 2509.24335), on latents; noised inputs
of xAR (arXiv 2502.20388), on latents; patches through a small state, PRA (arXiv 2606.27978), on pixels; x-prediction
with the error of v, JiT (arXiv 2511.13720), for whole images. Ours: their combination on raw patches, for which no
result is published; the laws of the corruption; the codec and its loss; PixelDiT's pixel head as the head of a patch.
Shapes: B images, L patches of F = 3 p p numbers, pieces of d = F or `bottleneck`, K draws, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import ClassVar, Literal

import torch
from pixelgen_kernels import philox
from torch import Tensor, nn

from pixelgen_fast.config import Objective, Sampling
from pixelgen_fast.diffusion.path import add_noise, slope, to_unit, truth, widen
from pixelgen_fast.diffusion.solver import SOLVERS, time_grid, velocity_field
from pixelgen_fast.diffusion.time import noise, sample_times
from pixelgen_fast.errors import InputError
from pixelgen_fast.layers import patchify, unpatchify
from pixelgen_fast.models import pixeldit, system
from pixelgen_fast.models.causal_trunk import CausalTrunk
from pixelgen_fast.models.masked_trunk import MaskedTrunk, gather
from pixelgen_fast.models.masking import most_known, random_ranks, training_mask
from pixelgen_fast.models.patch_codec import PatchCodec, on_sphere
from pixelgen_fast.models.patch_heads import MlpHead, PixelHead
from pixelgen_fast.models.piecewise import GuidanceSchedule, class_rows, draw_masked, draw_raster, guidance_at
from pixelgen_fast.models.system import SequentialSystem, depth_setting, width_setting
from pixelgen_fast.settings import above, at_least, refuse_unused, within


@dataclass
class Settings(system.Settings):
    """Size of a patch autoregressor. The defaults are B/16, causal, with an MLP head."""

    system: str = "patch_ar"
    hidden_size: int = 768
    num_heads: int = 12
    patch_size: int = 16
    trunk: Literal["causal", "masked"] = "causal"
    # blocks of a causal trunk; of the encoder, and as many of the decoder, of a masked one
    depth: int = depth_setting(24)
    # tokens of the class in front of the patches
    class_tokens: int = width_setting(16)
    # of a masked trunk: the least share of an image that training hides, and dropout in the blocks
    mask_low: float = within(0, 1, open_high=True, default=0.7)
    dropout: float = within(0, 1, open_high=True, default=0.0)
    head: Literal["mlp", "pixel"] = "mlp"
    head_depth: int = depth_setting(6)
    # of an MLP head: its width, and the width that a noised patch is squeezed to on its way in (0: none)
    head_width: int = width_setting(1024)
    head_bottleneck: int = at_least(0, default=0, most=65_536)
    # of a pixel head: channels of a pixel, and how much wider its MLP is
    pixel_channels: int = width_setting(16)
    channels_ratio: int = above(0, default=4, most=64)
    # draws of time and noise for each state of the trunk
    draws_per_patch: int = above(0, default=4, most=1024)
    # noise on what the trunk reads in training
    corruption: Literal["add", "mix"] = "mix"
    corruption_level: float = within(0, 1, default=0.5)
    # numbers that a patch is squeezed to and told in; 0: its pixels
    bottleneck: int = at_least(0, default=0, most=65_536)
    guidance_schedule: GuidanceSchedule = "linear"


class PatchAR(SequentialSystem):
    """The SequentialSystem of this module."""

    class_table: ClassVar[str] = "trunk.y_embed.weight"
    used_objective = frozenset(
        ["predict", "loss", "time", "time_mean", "time_std", "time_shift", "noise_scale", "class_drop", "t_eps"]
    )
    used_sampling = SequentialSystem.used_sampling | {"temperature"}

    def __init__(self, settings: Settings, image_size: int, num_classes: int) -> None:
        super().__init__(settings, image_size, num_classes)
        check(settings)
        s, D = settings, settings.hidden_size
        self.width, self.length = 3 * self.patch_size**2, self.grid**2
        self.piece_width, self.masked = s.bottleneck or self.width, s.trunk == "masked"
        self.mask_low, self.draws_per_patch, self.draws = s.mask_low, s.draws_per_patch, s.dropout > 0
        self.corruption, self.corruption_level = s.corruption, s.corruption_level
        self.guidance_schedule = s.guidance_schedule
        if self.masked:
            self.used_sampling = self.used_sampling | {"passes"}
            size = (D, s.depth, s.num_heads)
            self.trunk: nn.Module = MaskedTrunk(
                self.width, self.length, num_classes, s.class_tokens, size, size, s.dropout
            )
        else:
            self.trunk = CausalTrunk(self.width, self.grid, num_classes, s.class_tokens, D, s.depth, s.num_heads)
        self.codec = PatchCodec(self.width, s.bottleneck, D) if s.bottleneck else None
        self.head = build_head(s, self.piece_width)
        self.loss_weights = {"flow": 1.0} | ({"reconstruction": 1.0} if self.codec else {})

    def forward(self, images: Tensor, y: Tensor, numbers: Tensor, seed: int, objective: Objective) -> dict[str, Tensor]:
        self.check_images(images)
        patches = patchify(to_unit(images), self.patch_size).flatten(2)
        dtype = self.trunk.target_position.dtype
        pieces = patches.to(dtype) if self.codec is None else self.codec.encode(patches.to(dtype))
        inputs, parts = self.corrupted(pieces, seed, numbers).to(dtype), {}
        if self.codec is not None:
            inputs = self.codec.decode(inputs)
            parts["reconstruction"] = (widen(inputs) - patches).square().mean(dim=(1, 2))
        target = patches if self.codec is None else widen(pieces.detach())
        if not self.masked:
            z = self.trunk(inputs[:, :-1], y)
            return {"flow": self.flow_losses(z, target, numbers, seed, objective).mean(dim=1), **parts}
        hidden = training_mask(seed, numbers, self.length, self.mask_low)
        z = self.trunk(inputs, hidden, y, most_known(self.length, self.mask_low))
        losses = self.flow_losses(z, target, numbers, seed, objective) * hidden
        return {"flow": losses.sum(dim=1) / hidden.sum(dim=1), **parts}

    def corrupted(self, pieces_BLd: Tensor, seed: int, numbers: Tensor) -> Tensor:
        """What the trunk reads of the pieces in training; float32 where there is noise."""
        if not self.corruption_level:
            return pieces_BLd
        e = noise(seed, numbers, pieces_BLd.shape[1:], philox.CORRUPTION)
        if self.corruption == "add":
            return pieces_BLd + self.corruption_level * e
        level = self.corruption_level * noise_level(seed, numbers, self.length)[..., None]
        return (1 - level) * pieces_BLd + level * e

    def flow_losses(self, z_BLD: Tensor, x_BLd: Tensor, numbers: Tensor, seed: int, o: Objective) -> Tensor:
        """The mean over its draws of the error of each piece: float32 [B, L]."""
        (B, L, d), K = x_BLd.shape, self.draws_per_patch
        t = sample_times(seed, numbers, o.time, o.time_mean, o.time_std, o.time_shift, count=L * K).flatten()
        e = noise(seed, numbers, (L * K, d), philox.NOISE).flatten(0, 1)
        x, z = (value.repeat_interleave(K, dim=1).flatten(0, 1) for value in (x_BLd, z_BLD))
        u = add_noise(x, e, t, o.noise_scale).to(z.dtype)
        weight = slope(t, o.predict, o.loss, o.noise_scale, o.t_eps).square()
        losses = self.head(u, t, z, truth(o.predict, x, e, o.noise_scale), weight)
        return losses.view(B, L, K).mean(dim=2)

    def draw(
        self,
        labels: Tensor,
        numbers: Tensor,
        settings: Sampling,
        objective: Objective,
        before_pass: Callable[[], object],
    ) -> Tensor:
        self.check_settings(objective, settings)
        scale = settings.temperature * objective.noise_scale
        start_BLd = scale * noise(settings.seed, numbers, (self.length, self.piece_width), philox.SAMPLING)
        y = class_rows(labels, settings.guidance, self.num_classes)

        def tell(z_ND: Tensor, places_Bm: Tensor, known: float) -> Tensor:
            w = guidance_at(self.guidance_schedule, settings.guidance, known)
            start = gather(start_BLd, places_Bm).flatten(0, 1)
            return self.patches_of(self.solve(start, z_ND, w, settings, objective, before_pass)).unflatten(
                0, places_Bm.shape
            )

        if self.masked:
            ranks = random_ranks(settings.seed, numbers, self.length)
            patches = draw_masked(self.trunk, y, ranks, self.width, settings.passes, tell, before_pass)
        else:
            shape = (self.length, self.width)
            patches = draw_raster(self.trunk, y, len(labels), shape, tell, before_pass)
        return unpatchify(patches.float(), self.grid, self.patch_size)

    def solve(
        self, start_Nd: Tensor, z_RND: Tensor, guidance: float, s: Sampling, o: Objective,
        before_pass: Callable[[], object],
    ) -> Tensor:  # fmt: skip
        """Pieces [N, d] from their noise; z: of the null class and then of the labels where R = 2."""

        def network(u: Tensor, t: Tensor, _: Tensor) -> Tensor:
            before_pass()
            # the states of the labels are the last; they alone are asked where guidance does not act
            return self.head(u.to(z_RND.dtype), t, z_RND[-len(u) :])

        path = {"predict": o.predict, "noise_scale": o.noise_scale, "t_eps": o.t_eps}
        labels = torch.zeros(len(start_Nd), dtype=torch.int64, device=start_Nd.device)  # the states know their class
        field = velocity_field(network, labels, guidance=guidance, interval=s.interval, null_class=0, **path)
        start = start_Nd.to(torch.promote_types(z_RND.dtype, torch.float32))
        *_, piece = SOLVERS[s.solver](field, start, time_grid(s.steps, s.shift))
        return piece

    def patches_of(self, pieces_Nd: Tensor) -> Tensor:
        """Patches [N, F] of pieces that the flow ended in."""
        if self.codec is None:
            return pieces_Nd
        return self.codec.decode(on_sphere(pieces_Nd).to(self.trunk.target_position.dtype))

    def blocks(self) -> list[nn.Module]:
        return [*self.trunk.blocks(), *self.head.blocks()]

    def whole_modules(self) -> list[nn.Module]:
        return [*self.trunk.blocks(), *self.head.whole_modules()]


def noise_level(seed: int, numbers: Tensor, length: int) -> Tensor:
    """A uniform number for each piece: [B, L]."""
    return philox.uniform(seed, numbers, philox.CORRUPTION_LEVEL, length)


def build_head(s: Settings, piece_width: int) -> MlpHead | PixelHead:
    if s.head == "mlp":
        # thousandths, as SphereAR has it: the sinusoids of an integer step
        return MlpHead(
            piece_width, s.hidden_size, s.head_width, s.head_depth, bottleneck=s.head_bottleneck, time_scale=1000.0
        )
    return PixelHead(
        pixeldit.Settings(
            hidden_size=s.hidden_size,
            num_heads=s.num_heads,
            patch_size=s.patch_size,
            pixel_hidden_size=s.pixel_channels,
            pixel_depth=s.head_depth,
            pixel_mlp_ratio=s.channels_ratio,
        )
    )


def check(settings: Settings) -> None:
    """Raise InputError, naming the setting and its value, for what does not go together."""
    unused = {
        "causal": ("mask_low", "dropout"),
        "masked": (),
        "mlp": ("pixel_channels", "channels_ratio"),
        "pixel": ("head_width", "head_bottleneck"),
    }
    for name in ("trunk", "head"):
        chosen = getattr(settings, name)
        used = {entry.name for entry in fields(Settings)} - {*unused[chosen]}
        refuse_unused(settings, Settings, used, "model.", f"model.{name}={chosen}")
    if settings.bottleneck and settings.head == "pixel":
        raise InputError(
            f"model.bottleneck {settings.bottleneck} leaves no pixels for model.head=pixel; use model.head=mlp"
        )


def build(settings: Settings, image_size: int, num_classes: int) -> PatchAR:
    """The model of a configuration, with fresh weights."""
    return PatchAR(settings, image_size, num_classes)
