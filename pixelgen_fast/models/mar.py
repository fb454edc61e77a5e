"""MAR: a masked encoder-decoder over patches, and a small diffusion for each of them (arXiv 2406.11838).

    z    = masked trunk(patches that are known)                                         masked_trunk.py
    loss = mean over hidden patches and K draws of (t, e) of the diffusion's loss       ddpm.py, patch_heads.MlpHead
    draw = in pass after pass the patches whose turn it is, each by the diffusion's steps, guided in e^ alone

As published but for two things: each image hides as many patches as its own number draws, and not as its batch does,
and its loss is the mean over those. Nothing is clipped in drawing: of 100 steps the first multiplies an error of e^ by
316, so that a head which is small or little trained ends in noise. The published networks are of latents: channels 16,
patch 1, 16 x 16 of them. Such a one draws latents (draw_tokens); no decoder that makes images of them is here.
Shapes: B images, L patches of d = channels p p numbers, ordered (channel, row, column), K draws, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from einops import rearrange
from pixelgen_kernels import philox
from torch import Tensor, nn

from pixelgen_fast.config import Objective, Sampling
from pixelgen_fast.diffusion import ddpm
from pixelgen_fast.diffusion.path import to_unit, widen
from pixelgen_fast.diffusion.time import noise
from pixelgen_fast.errors import InputError
from pixelgen_fast.models import system
from pixelgen_fast.models.masked_trunk import MaskedTrunk, gather
from pixelgen_fast.models.masking import most_known, random_ranks, training_mask
from pixelgen_fast.models.patch_heads import MlpHead
from pixelgen_fast.models.piecewise import class_rows, draw_masked, guidance_at
from pixelgen_fast.models.system import SequentialSystem, depth_setting, width_setting
from pixelgen_fast.settings import above, at_least, within

PIXELS = 3


@dataclass
class Settings(system.Settings):
    """Size of a MAR. The defaults are B on patches of 16 x 16 pixels."""

    system: str = "mar"
    # hidden_size, num_heads, depth: of the encoder; the decoder's are the same where they are 0
    hidden_size: int = 768
    num_heads: int = 12
    depth: int = depth_setting(12)
    decoder_hidden_size: int = at_least(0, default=0, most=65_536)
    decoder_num_heads: int = at_least(0, default=0, most=65_536)
    decoder_depth: int = at_least(0, default=0, most=1000)
    patch_size: int = 16
    # 3: pixels; another number: latents
    channels: int = width_setting(PIXELS)
    # tokens of the class in front of the patches
    class_tokens: int = width_setting(64)
    # the least share of an image that training hides
    mask_low: float = within(0, 1, open_high=True, default=0.7)
    dropout: float = within(0, 1, open_high=True, default=0.1)
    head_width: int = width_setting(1024)
    head_depth: int = depth_setting(6)
    # draws of time and noise for each patch
    draws_per_patch: int = above(0, default=4, most=1024)


class Mar(SequentialSystem):
    """The SequentialSystem of this module."""

    class_table: ClassVar[str] = "trunk.y_embed.weight"
    used_objective = frozenset(["class_drop"])
    used_sampling = frozenset(["steps", "guidance", "temperature", "passes", "seed", "batch"])

    def __init__(self, settings: Settings, image_size: int, num_classes: int) -> None:
        super().__init__(settings, image_size, num_classes)
        s = settings
        self.channels, self.length, self.width = s.channels, self.grid**2, s.channels * self.patch_size**2
        self.mask_low, self.draws_per_patch, self.draws = s.mask_low, s.draws_per_patch, s.dropout > 0
        encoder, decoder = (s.hidden_size, s.depth, s.num_heads), decoder_of(s)
        self.trunk = MaskedTrunk(self.width, self.length, num_classes, s.class_tokens, encoder, decoder, s.dropout)
        self.head = MlpHead(self.width, decoder[0], s.head_width, s.head_depth, out=2 * self.width)
        self.register_buffer("diffusion_steps", ddpm.table(), persistent=False)

    def forward(self, images: Tensor, y: Tensor, numbers: Tensor, seed: int, objective: Objective) -> dict[str, Tensor]:
        self.check_images(images)
        self.check_pixels()
        tokens = self.tokens(to_unit(images))
        (B, L, d), K = tokens.shape, self.draws_per_patch
        hidden = training_mask(seed, numbers, L, self.mask_low)
        u = philox.uniform(seed, numbers, philox.TIME, L * K).view(B, L, K)
        e = noise(seed, numbers, (L, K, d))
        z = self.trunk(tokens.to(self.head.enter.weight.dtype), hidden, y, most_known(L, self.mask_low))
        losses = self.token_losses(z, tokens, (u * ddpm.STEPS).long(), e) * hidden
        return {"loss": losses.sum(dim=1) / hidden.sum(dim=1)}

    def token_losses(self, z_BLD: Tensor, x_BLd: Tensor, t_BLK: Tensor, e_BLKd: Tensor) -> Tensor:
        """The mean over its draws of the diffusion's loss of each token [B, L]; t: whole numbers in [0, 1000)."""
        K, t, e = t_BLK.shape[2], t_BLK.flatten(), e_BLKd.flatten(0, 2)
        x, z = (value.repeat_interleave(K, dim=1).flatten(0, 1) for value in (x_BLd, z_BLD))
        step = ddpm.at(self.diffusion_steps, t)
        u = ddpm.noised(x, e, step)
        output = widen(self.head(u.to(z.dtype), t, z))
        return ddpm.losses(output, x, e, u, t, step).view(t_BLK.shape).mean(dim=2)

    def draw(
        self,
        labels: Tensor,
        numbers: Tensor,
        settings: Sampling,
        objective: Objective,
        before_pass: Callable[[], object],
    ) -> Tensor:
        self.check_settings(objective, settings)
        self.check_pixels()
        return self.image(self.draw_tokens(labels, numbers, settings, before_pass)).float()

    def draw_tokens(
        self, labels: Tensor, numbers: Tensor, settings: Sampling, before_pass: Callable[[], object] = int
    ) -> Tensor:
        """The patches or latents of samples: [B, L, d]; see `SequentialSystem.draw`."""
        start_BLd = noise(settings.seed, numbers, (self.length, self.width), philox.SAMPLING)
        y = class_rows(labels, settings.guidance, self.num_classes)

        def tell(z_ND: Tensor, places_Bm: Tensor, known: float) -> Tensor:
            start = gather(start_BLd, places_Bm).flatten(0, 1)
            # the noise of a token's steps is that of its number among all tokens of all samples
            token_numbers = (numbers[:, None] * self.length + places_Bm).flatten()
            w = guidance_at("linear", settings.guidance, known)
            return self.diffuse(start, z_ND, token_numbers, w, settings, before_pass).unflatten(0, places_Bm.shape)

        ranks = random_ranks(settings.seed, numbers, self.length)
        return draw_masked(self.trunk, y, ranks, self.width, settings.passes, tell, before_pass)

    def diffuse(
        self,
        u_Nd: Tensor,
        z_RND: Tensor,
        token_numbers: Tensor,
        guidance: float,
        s: Sampling,
        before_pass: Callable[[], object],
    ) -> Tensor:
        """Tokens [N, d] from their noise; z: of the null class and then of the labels where R = 2."""
        kept, signal, rows = ddpm.kept_steps(s.steps), ddpm.cosine_signal(), len(z_RND) // len(u_Nd)
        steps = ddpm.chain([signal[t] for t in kept])
        u = u_Nd.to(torch.promote_types(z_RND.dtype, torch.float32))
        for number, (t, step) in reversed([*enumerate(zip(kept, steps, strict=True))]):
            before_pass()
            times = torch.full((len(z_RND),), t, device=u.device)
            e_hat, r = widen(self.head(u.to(z_RND.dtype).repeat(rows, 1), times, z_RND)).chunk(2, dim=-1)
            if rows == 2:
                (null, e_hat), r = e_hat.chunk(2), r.chunk(2)[1]
                e_hat = null + guidance * (e_hat - null)
            fresh = None
            if number:
                stream = philox.SAMPLING_STEPS + number
                fresh = s.temperature * philox.normal(s.seed, token_numbers, stream, self.width)
            u = ddpm.draw_step(e_hat, r, u, step, fresh)
        return u

    def tokens(self, x: Tensor) -> Tensor:
        """Images or latents [B, C, S, S] as patches [B, L, d]."""
        p = self.patch_size
        return rearrange(x, "B C (h p) (w q) -> B (h w) (C p q)", p=p, q=p)

    def image(self, tokens: Tensor) -> Tensor:
        """The other way."""
        p, n = self.patch_size, self.grid
        return rearrange(tokens, "B (h w) (C p q) -> B C (h p) (w q)", h=n, w=n, p=p, q=p)

    def check_pixels(self) -> None:
        """Raise InputError where the network is one of latents, which are no images."""
        if self.channels != PIXELS:
            raise InputError(
                f"model.channels is {self.channels}: this MAR knows latents, and no decoder makes images of them here; "
                f"`draw_tokens` draws latents, a MAR of pixels has model.channels={PIXELS}"
            )

    def blocks(self) -> list[nn.Module]:
        return [*self.trunk.blocks(), *self.head.blocks()]

    def whole_modules(self) -> list[nn.Module]:
        return self.trunk.blocks()


def decoder_of(s: Settings) -> tuple[int, int, int]:
    """Width, blocks and heads of the decoder. Raises InputError for heads that do not divide the width."""
    width, heads = s.decoder_hidden_size or s.hidden_size, s.decoder_num_heads or s.num_heads
    if width % heads:
        raise InputError(f"model.decoder_num_heads {heads} does not divide model.decoder_hidden_size {width}")
    return width, s.decoder_depth or s.depth, heads


def build(settings: Settings, image_size: int, num_classes: int) -> Mar:
    """The model of a configuration, with fresh weights."""
    return Mar(settings, image_size, num_classes)
