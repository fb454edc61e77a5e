"""PixelDiT with a DINO that reads the noised image in place of its patch embedding, or of its whole patch transformer.

    f      = DINO_student(z, t)                                                L tokens of width D' (models/dino.py)
    input:   s = patch blocks (W f, SiLU(embed(t) + embed(y))),   condition = SiLU(embed(t) + s)
    trunk:                                                        condition = SiLU(embed(t) + embed(y) + W f)
    output = pixel head (pixels of z, condition)                               as in PixelDiT (models/pixeldit.py)

PixelDiT's pixel head learns the class through s alone; a trunk of DINO has no place for a class, so there it is added
to the condition. Feature alignment may read f (tap 0), which then follows the teacher's tokens of the clean image.
Shapes: B batch, L patches, P pixels per patch, N = B L, D width, D' width of the DINO, C pixel channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from einops import rearrange
from pixelgen_kernels import philox
from torch import Tensor, nn

from pixelgen_fast.models import pixeldit
from pixelgen_fast.models.dino import NoisyDino
from pixelgen_fast.models.layers import Noising
from pixelgen_fast.models.teacher import load_dino

KEYS = ("model.dino", "model.weights")


@dataclass
class Config(pixeldit.Config):
    """Size of a PixelDiT and the DINO in it. The defaults are XL/16 with DINOv3 S/16 as its input."""

    system: str = "dino_student"
    # input: the DINO takes the place of the linear patch embedding; trunk: of the patch blocks too (patch_depth 0)
    role: Literal["input", "trunk"] = "input"
    # a DINOv2 or DINOv3 of timm
    dino: str = "vit_small_patch16_dinov3.lvd1689m"
    # where it starts: a file in timm's or Meta's names, a folder that holds a teacher, or "random"; null: from the hub.
    # It is read when a run begins, which keeps a copy, and so does an export
    weights: str | None = None
    tuning: Literal["full", "lora", "frozen"] = "full"
    lora_rank: int = 16
    # how the DINO learns t: a prefix token, or not at all, when it starts as exactly the teacher
    time_token: Literal["token", "masked"] = "token"


class DinoStudent(pixeldit.PixelDiT):
    """forward(z [B, 3, S, S], t [B] in [0, 1], y int64 [B]) -> [B, 3, S, S]; y = num_classes is the null class.

    With tap = 0, `forward` and `velocity_loss` also return the DINO's tokens [B, L, D'], with tap = k, from 1 to
    tap_depth, the stream after patch block k [B, L, D]; tap_width(tap) is their width. Raises ValueError for other
    images or another tap.
    """

    def __init__(self, config: Config, image_size: int, num_classes: int) -> None:
        trunk = config.role == "trunk"
        if trunk != (config.patch_depth == 0):
            raise ValueError(
                f"model.patch_depth is {config.patch_depth} and model.role is {config.role}: a trunk has no patch "
                "blocks (patch_depth 0), an input feeds at least one"
            )
        network = load_dino(config.dino, config.weights, KEYS)
        super().__init__(config, image_size, num_classes, nn.Linear(network.num_features, config.hidden_size))
        self.dino = NoisyDino(
            network,
            self.grid,
            tuning=config.tuning,
            lora_rank=config.lora_rank,
            time_token=config.time_token,
        )

    def forward(self, z: Tensor, t: Tensor, y: Tensor, tap: int | None = None) -> Tensor | tuple[Tensor, Tensor]:
        self._check(z.shape[1:], (3, self.image_size, self.image_size))
        x_NPC, tapped = self.both_stages(z, t, y, tap)
        prediction = self.unpatchify(self.head(x_NPC))
        return prediction if tap is None else (prediction, tapped)

    def velocity_loss(
        self, images: Tensor, y: Tensor, noising: Noising, weight_B: Tensor, tap: int | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """As PixelDiT's; the noised images are made first, for the DINO reads them whole."""
        self._check(images.shape[1:], (self.image_size, self.image_size, 3))
        z, velocity = noised(images, noising)
        x_NPC, tapped = self.both_stages(z.to(self.patch_embed.weight.dtype), noising.t, y, tap)
        loss_B = self.head(x_NPC, self.patchify(velocity).flatten(0, 1), weight_B)
        return loss_B if tap is None else (loss_B, tapped)

    def both_stages(self, z: Tensor, t: Tensor, y: Tensor, tap: int | None) -> tuple[Tensor, Tensor | None]:
        """Noised images to the pixel stream [N, P, C], and what `tap` asks for."""
        features = self.dino(z, t)
        t_BD, y_BD = self.t_embed(t), self.y_embed(y)
        tokens = self.patch_embed(features)
        # role trunk: the patch stage has no blocks and returns the tokens, and refuses a tap but 0
        s_BLD, tapped = self.patch_stage(tokens, F.silu(t_BD + y_BD), tap or None)
        c_BD = t_BD if self.patch_blocks else t_BD + y_BD
        x_NPC = self.pixel_stage(self.patchify(z), F.silu(c_BD[:, None] + s_BLD))
        return x_NPC, features if tap == 0 else tapped

    def tap_width(self, tap: int) -> int:
        """Width of the tokens that `tap` gives."""
        return self.dino.width if tap == 0 else self.hidden_size

    def blocks(self) -> list[nn.Module]:
        return [*super().blocks(), *self.dino.network.blocks]

    def whole_modules(self) -> list[nn.Module]:
        # Without the DINO: ZeRO-3 frees a whole module too early whose input, here z, takes no gradient. It finds the
        # tokens that the DINO reads from its network by itself.
        return [*super().blocks(), self.head]

    def patchify(self, image: Tensor) -> Tensor:
        p = self.patch_size
        return rearrange(image, "B C (h p) (w q) -> B (h w) (p q) C", p=p, q=p)


def noised(images: Tensor, noising: Noising) -> tuple[Tensor, Tensor]:
    """z = t x + (1 - t) noise_scale e and v = x - noise_scale e of uint8 [B, S, S, 3], both float32 [B, 3, S, S]."""
    x = rearrange(images, "B H W C -> B C H W").float() / 127.5 - 1.0
    e = philox.normal(noising.seed, noising.numbers, philox.NOISE, x[0].numel()).view_as(x) * noising.noise_scale
    t = noising.t[:, None, None, None]
    return t * x + (1.0 - t) * e, x - e


def build(config: Config, image_size: int, num_classes: int) -> DinoStudent:
    """The model of a configuration: fresh weights, but for those of the DINO."""
    return DinoStudent(config, image_size, num_classes)
