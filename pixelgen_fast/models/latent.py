"""Flows that end in the latents of a frozen autoencoder: what they are told, and the image that they become.

    encode: images uint8 [B, S, S, 3] -> x [B, C, n, n]       decode: x -> images [B, 3, S, S], about [-1, 1]

A latent stands for p x p pixels, n = S / p, whatever size the encoder itself reads images at. The autoencoder is not
trained here: it is neither a child of the model nor sharded nor saved with its weights.
Shapes: B images of S x S pixels, C channels, n x n latents, L = n n, p = patch_size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, Protocol

import torch
from einops import rearrange
from torch import Tensor, nn

from pixelgen_fast.diffusion.path import to_unit
from pixelgen_fast.errors import InputError
from pixelgen_fast.models import system
from pixelgen_fast.models.built_on import BuiltOn
from pixelgen_fast.models.system import System, shape_text, width_setting
from pixelgen_fast.rae.autoencoder import load_autoencoder
from pixelgen_fast.rae.copy import PLACES, copy_autoencoder
from pixelgen_fast.rae.decoder import Decoder

PATCHES = "patches"
KEYS = ("model.encoder", "model.encoder_weights")
AUTOENCODER = BuiltOn("autoencoder", PLACES, copy_autoencoder, used=lambda model: model.reads_files, network="encoder")


@dataclass
class Settings(system.Settings):
    """What the settings of every flow in latents have. A run and an export keep copies of what they name."""

    built_on: ClassVar[tuple[BuiltOn, ...]] = (AUTOENCODER,)

    # pixels a side that a latent stands for
    patch_size: int = 16
    latent_channels: int = width_setting(768)
    # a vision transformer of timm whose tokens are the latents; patches: the pixels of patches themselves; null: the
    # model is given latents, and neither trains on images nor draws them
    encoder: str | None = None
    # a file in timm's, Meta's or Hugging Face's names, a folder that holds a network, or "random"; null: from the hub
    encoder_weights: str | None = None
    # blocks, counted from 0, whose mean is taken, as RAEv2 does; none: the last one alone
    encoder_layers: list[int] = field(default_factory=list)
    # what draws: a folder of `pixelgen decoder`, or a published file
    decoder: str | None = None
    # mean and variance of the latents: a file of `pixelgen latents`, or a published one; null: they stay as they are
    statistics: str | None = None

    def alone(self) -> Settings:
        nothing = dict.fromkeys(("encoder", "encoder_weights", "decoder", "statistics"))
        return replace(self, **nothing, encoder_layers=[])

    @property
    def reads_files(self) -> bool:
        """Whether an encoder, and all that it comes with, is read from files."""
        return self.encoder not in (None, PATCHES)


class Autoencoder(Protocol):
    """latent_shape: (C, n, n). encode and decode as above, float32 both, without gradients."""

    latent_shape: tuple[int, int, int]

    def encode(self, images: Tensor) -> Tensor: ...

    def decode(self, x: Tensor) -> Tensor: ...


class PatchPixels(nn.Module):
    """The autoencoder that loses nothing: a latent is the pixels of its patch in [-1, 1], channel by channel."""

    def __init__(self, image_size: int, patch_size: int) -> None:
        super().__init__()
        self.patch = patch_size
        self.latent_shape = (3 * patch_size**2, *2 * (image_size // patch_size,))

    def encode(self, images: Tensor) -> Tensor:
        return rearrange(to_unit(images), "B C (h p) (w q) -> B (C p q) h w", p=self.patch, q=self.patch)

    def decode(self, x: Tensor) -> Tensor:
        return rearrange(x, "B (C p q) h w -> B C (h p) (w q)", p=self.patch, q=self.patch)


class Unread:
    """What stands for an autoencoder from files on the meta device, where numbers have no values: shapes alone."""

    def __init__(self, latent_shape: tuple[int, int, int], image_size: int) -> None:
        self.latent_shape, self.image_size = latent_shape, image_size

    def encode(self, images: Tensor) -> Tensor:
        return images.new_empty(len(images), *self.latent_shape, dtype=torch.float32)

    def decode(self, x: Tensor) -> Tensor:
        return x.new_empty(len(x), 3, self.image_size, self.image_size)


def open_autoencoder(settings: Settings, image_size: int) -> Autoencoder | None:
    """The autoencoder that settings name; None where they name none. Raises InputError for one that does not fit.

    On the meta device no file is read.
    """
    s, grid = settings, image_size // settings.patch_size
    if not s.reads_files and (given := [k for k in ("encoder_weights", "decoder", "statistics") if getattr(s, k)]):
        raise InputError(
            f"model.{given[0]} is {getattr(s, given[0])}, and model.encoder is {s.encoder or 'null'}; name the network "
            "whose latents it is of in model.encoder"
        )
    if s.encoder is None:
        return None
    if s.reads_files and torch.get_default_device().type == "meta":
        return Unread((s.latent_channels, grid, grid), image_size)
    found: Autoencoder = PatchPixels(image_size, s.patch_size)
    if s.reads_files:
        found = load_autoencoder(
            s.encoder,
            s.encoder_weights,
            grid=grid,
            layers=s.encoder_layers,
            decoder=s.decoder,
            statistics=s.statistics,
            keys=KEYS,
        )
        check_decoder(found.decoder, image_size)
    if found.latent_shape != (s.latent_channels, grid, grid):
        raise InputError(
            f"model.latent_channels is {s.latent_channels}, and model.encoder {s.encoder} gives "
            f"{found.latent_shape[0]}; set model.latent_channels={found.latent_shape[0]}"
        )
    return found


def check_decoder(decoder: Decoder | None, image_size: int) -> None:
    """Raise InputError for a decoder that draws images of another size."""
    if decoder is not None and decoder.image_size != image_size:
        raise InputError(
            f"data.image_size is {image_size}, and model.decoder draws {decoder.image_size} pixels a side; name one of "
            "that size"
        )


class LatentSystem(System):
    """A flow from noise to latents. The autoencoder moves, and is cast, with the model."""

    def __init__(self, settings: Settings, image_size: int, num_classes: int, tap_depth: int) -> None:
        super().__init__(settings, image_size, num_classes, tap_depth)
        self.latent_channels = settings.latent_channels
        self._draws = not settings.reads_files or settings.decoder is not None
        self._settings = settings
        # a module that is an attribute would become a child
        self._autoencoder = (open_autoencoder(settings, image_size),)

    @property
    def sample_shape(self) -> Sequence[int]:
        return (self.latent_channels, self.grid, self.grid)

    @property
    def autoencoder(self) -> Autoencoder:
        """Raises InputError where there is none."""
        if self._autoencoder[0] is None:
            raise InputError(
                "model.encoder is null, and images become latents and are drawn by an autoencoder alone; name one in "
                "model.encoder and model.decoder"
            )
        return self._autoencoder[0]

    def read_shapes(self) -> None:
        s = self._settings
        if s.reads_files:
            # a folder says the sizes of the network that it holds; a file does not, and need not be here
            folder = s.encoder_weights if s.encoder_weights and Path(s.encoder_weights).is_dir() else None
            with torch.device("meta"):
                encoder = load_autoencoder(s.encoder, folder, grid=self.grid, layers=s.encoder_layers, keys=KEYS)
            self._autoencoder = (encoder.to(next(self.parameters()).dtype),)

    def check_complete(self) -> None:
        if self.autoencoder is not None and not self._draws:
            raise InputError(
                "model.decoder is null, and a run draws what it has learned; name a published decoder, or one that was "
                "trained"
            )

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        self.check_images(images)
        return self.autoencoder.encode(images).float()

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        self.check_latents(x)
        return self.autoencoder.decode(x).float()

    def check_latents(self, z: Tensor) -> None:
        """Raise ValueError for latents of another shape than the model's; z [B, C, n, n]."""
        if tuple(z.shape[1:]) != tuple(self.sample_shape):
            name, (wanted, found) = type(self).__name__, map(shape_text, (self.sample_shape, z.shape[1:]))
            raise ValueError(f"{name} was built for latents {wanted}, got {found}")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        if isinstance(self._autoencoder[0], nn.Module):
            self._autoencoder[0]._apply(fn, recurse)
        return super()._apply(fn, recurse)
