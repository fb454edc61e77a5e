"""PixelDiT with a DINO that reads the noised image in place of its patch embedding, or of its whole patch transformer.

    f      = DINO_student(z, t)                                                L tokens of width D' (dino/noisy.py)
    input:   s = patch blocks (W f, SiLU(embed(t) + embed(y))),   condition = SiLU(embed(t) + s)
    trunk:                                                        condition = SiLU(embed(t) + embed(y) + W f)
    output = pixel head (pixels of z, condition)                               as in PixelDiT (models/pixeldit.py)

PixelDiT's pixel head learns the class through s alone; a trunk of DINO has no place for a class, so there it is added
to the condition. Feature alignment may read f (tap 0), which then follows the teacher's tokens of the clean image.
Shapes: B batch, L patches, P pixels per patch, N = B L, D width, D' width of the DINO, C pixel channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from pixelgen_fast.diffusion.path import Noising
from pixelgen_fast.dino.network import load_dino
from pixelgen_fast.dino.noisy import NoisyDino
from pixelgen_fast.errors import InputError
from pixelgen_fast.layers import patchify, unpatchify
from pixelgen_fast.models import pixeldit
from pixelgen_fast.models.built_on import DINO, BuiltOn
from pixelgen_fast.models.matrices import Matrices, matrices_of
from pixelgen_fast.models.system import width_setting

KEYS = ("model.dino", "model.weights")


@dataclass
class Settings(pixeldit.Settings):
    """Size of a PixelDiT and the DINO in it. The defaults are XL/16 with DINOv3 S/16 as its input."""

    built_on: ClassVar[tuple[BuiltOn, ...]] = (DINO,)

    system: str = "dino_student"
    # input: the DINO takes the place of the linear patch embedding; trunk: of the patch blocks too (patch_depth 0)
    role: Literal["input", "trunk"] = "input"
    # a DINOv2 or DINOv3 of timm
    dino: str = "vit_small_patch16_dinov3.lvd1689m"
    # where it starts: a file in timm's, Meta's or Hugging Face's names, a teacher's folder, or "random"; null takes
    # the hub's. It is read when a run begins, which keeps a copy, and so does an export
    weights: str | None = None
    tuning: Literal["full", "lora", "frozen"] = "full"
    lora_rank: int = width_setting(16)
    # how the DINO learns t: a prefix token, or not at all, when it starts as exactly the teacher
    time_token: Literal["token", "masked"] = "token"


class DinoStudent(pixeldit.PixelDiT):
    """The System of this module; its tap 0 gives the DINO's own tokens [B, L, D']."""

    first_tap: ClassVar[int] = 0

    def __init__(self, settings: Settings, image_size: int, num_classes: int) -> None:
        trunk = settings.role == "trunk"
        if trunk != (settings.patch_depth == 0):
            raise InputError(
                f"model.patch_depth is {settings.patch_depth} and model.role is {settings.role}: a trunk has no patch "
                "blocks (patch_depth 0), an input feeds at least one"
            )
        network = load_dino(settings.dino, settings.weights, KEYS)
        super().__init__(settings, image_size, num_classes, nn.Linear(network.num_features, settings.hidden_size))
        self.dino = NoisyDino(
            network,
            self.grid,
            tuning=settings.tuning,
            lora_rank=settings.lora_rank,
            time_token=settings.time_token,
        )

    def forward(self, z: Tensor, t: Tensor, y: Tensor, tap: int | None = None) -> Tensor | tuple[Tensor, Tensor]:
        self.check_images(z)
        self.check_tap(tap)
        x_NPC, tapped = self.both_stages(z, t, y, tap)
        prediction = unpatchify(self.head(x_NPC), self.grid, self.patch_size)
        return prediction if tap is None else (prediction, tapped)

    def velocity_loss(
        self, images: Tensor, y: Tensor, noising: Noising, weight_B: Tensor, tap: int | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """As PixelDiT's; the noised images are made first, for the DINO reads them whole."""
        self.check_images(images)
        self.check_tap(tap)
        z, x, e = noising.of(images)
        velocity = x - noising.noise_scale * e
        x_NPC, tapped = self.both_stages(z.to(self.patch_embed.weight.dtype), noising.t, y, tap)
        loss_B = self.head(x_NPC, patchify(velocity, self.patch_size).flatten(0, 1), weight_B)
        return loss_B if tap is None else (loss_B, tapped)

    def both_stages(self, z: Tensor, t: Tensor, y: Tensor, tap: int | None) -> tuple[Tensor, Tensor | None]:
        """Noised images to the pixel stream [N, P, C], and what `tap` asks for."""
        features = self.dino(z, t)
        t_BD, y_BD = self.t_embed(t), self.y_embed(y)
        tokens = self.patch_embed(features)
        # role trunk: the patch stage has no blocks and returns the tokens
        s_BLD, tapped = self.patch_stage(tokens, F.silu(t_BD + y_BD), tap or None)
        c_BD = t_BD if self.patch_blocks else t_BD + y_BD
        x_NPC = self.pixel_stage(patchify(z, self.patch_size), F.silu(c_BD[:, None] + s_BLD))
        return x_NPC, features if tap == 0 else tapped

    def tap_width(self, tap: int) -> int:
        return self.dino.width if tap == 0 else self.hidden_size

    def blocks(self) -> list[nn.Module]:
        return [*super().blocks(), *self.dino.network.blocks]

    def matrices(self) -> Matrices:
        """Without the DINO: AdamW has trained it, and goes on with it or with its LoRA."""
        return matrices_of(super().blocks())

    def whole_modules(self) -> list[nn.Module]:
        # Without the DINO: ZeRO-3 frees a whole module too early whose input, here z, takes no gradient. It finds the
        # tokens that the DINO reads from its network by itself.
        return [*super().blocks(), self.head]


def build(settings: Settings, image_size: int, num_classes: int) -> DinoStudent:
    """The model of a configuration: fresh weights, but for those of the DINO."""
    return DinoStudent(settings, image_size, num_classes)
