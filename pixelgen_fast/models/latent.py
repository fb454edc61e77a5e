"""Flows that end in the latents of a frozen autoencoder: what they are told, and the image that they become.

    encode: images uint8 [B, S, S, 3] -> x [B, C, n, n]       decode: x -> images [B, 3, S, S], about [-1, 1]

A latent stands for p x p pixels, n = S / p, whatever size the encoder itself reads images at. The autoencoder is not
trained here: it is neither a child of the model nor sharded nor saved with its weights.
Shapes: B images of S x S pixels, C channels, n x n latents, L = n n, p = patch_size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from einops import rearrange
from torch import Tensor, nn

from pixelgen_fast.diffusion.path import to_unit
from pixelgen_fast.errors import InputError
from pixelgen_fast.models import system
from pixelgen_fast.models.system import System, shape_text, width_setting

PATCHES = "patches"


@dataclass
class Settings(system.Settings):
    """What the settings of every flow in latents have."""

    # pixels a side that a latent stands for
    patch_size: int = 16
    latent_channels: int = width_setting(768)
    # patches: the latents are the pixels of patches themselves. null: the model is given latents, and neither trains on
    # images nor draws them
    encoder: str | None = None


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


def open_autoencoder(settings: Settings, image_size: int) -> Autoencoder | None:
    """The autoencoder that settings name; None where they name none. Raises InputError for one that does not fit."""
    if settings.encoder is None:
        return None
    if settings.encoder != PATCHES:
        raise InputError(f"model.encoder {settings.encoder!r} is unknown; give {PATCHES!r}, or null for latents alone")
    found = PatchPixels(image_size, settings.patch_size)
    if found.latent_shape[0] != settings.latent_channels:
        raise InputError(
            f"model.latent_channels is {settings.latent_channels}, and model.encoder {settings.encoder} gives "
            f"{found.latent_shape[0]}; set model.latent_channels={found.latent_shape[0]}"
        )
    return found


class LatentSystem(System):
    """A flow from noise to latents. The autoencoder moves, and is cast, with the model."""

    def __init__(self, settings: Settings, image_size: int, num_classes: int, tap_depth: int) -> None:
        super().__init__(settings, image_size, num_classes, tap_depth)
        self.latent_channels = settings.latent_channels
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
                "model.encoder"
            )
        return self._autoencoder[0]

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
