"""Images to standardised latents and back: a frozen encoder, the statistics of its latents, a frozen decoder.

    encode    x = (z - mean) / sqrt(var + 1e-5),   z = encoder(image)          mean and var of each element of z
    decode    image = decoder(x sqrt(var + 1e-5) + mean)

(arXiv 2510.11690.) Shapes: B images, S pixels a side, C latent channels, n x n latent tokens.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from pixelgen_fast import hub
from pixelgen_fast.diffusion.path import to_fractions, widen
from pixelgen_fast.errors import InputError
from pixelgen_fast.layers import Float32Tables
from pixelgen_fast.rae.decoder import Decoder
from pixelgen_fast.rae.encoder import Encoder, copy_encoder, load_encoder
from pixelgen_fast.rae.files import (
    Statistics,
    load_decoder,
    own_encoder,
    read_about,
    read_statistics,
    save_decoder,
)

EPS = 1e-5


class Autoencoder(Float32Tables):
    """encode(images) and decode(x); neither is trained. It moves and is cast as any module; latents stay float32.

    encoder, decoder: one of them may be None, for what is not asked of it. statistics: None standardises nothing.
    Raises InputError for parts whose latents have different shapes.
    """

    def __init__(self, encoder: Encoder | None, decoder: Decoder | None, statistics: Statistics | None = None) -> None:
        super().__init__()
        if encoder is None and decoder is None:
            raise ValueError("an autoencoder has an encoder, a decoder or both")
        self.encoder, self.decoder = encoder, decoder
        self.latent_shape = _latent_shape(encoder, decoder)
        if statistics is None:
            statistics = Statistics(torch.zeros(self.latent_shape), torch.ones(self.latent_shape) - EPS)
        if tuple(statistics.mean.shape) != self.latent_shape:
            raise InputError(
                f"the statistics are of latents {list(statistics.mean.shape)} and these are {list(self.latent_shape)}; "
                "take those of this encoder and image size, or make them with pixelgen latents"
            )
        self.register_buffer("mean", statistics.mean.float(), persistent=False)
        self.register_buffer("deviation", (statistics.var + EPS).sqrt().float(), persistent=False)
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Latents of images uint8 [B, S, S, 3], of mean 0 and variance 1: float32 [B, C, n, n]."""
        if self.encoder is None:
            raise InputError("this autoencoder has no encoder: name one to train or to encode images")
        return self.standardise(self.encoder(to_fractions(images)))

    def decode(self, x: Tensor) -> Tensor:
        """Images of latents [B, C, n, n]: float32 [B, 3, S, S], about [-1, 1], not clipped. Differentiable."""
        if self.decoder is None:
            raise InputError("this autoencoder has no decoder: name one to draw images")
        return 2 * self.decoder(widen(x) * self.deviation + self.mean) - 1

    def standardise(self, z: Tensor) -> Tensor:
        """Latents as the encoder gives them, [B, C, n, n], to mean 0 and variance 1."""
        return (widen(z) - self.mean) / self.deviation

    def train(self, mode: bool = True) -> Autoencoder:
        """Stays in evaluation mode, whatever is asked."""
        return super().train(False)


def load_autoencoder(
    encoder: str | None,
    weights: str | None = None,
    *,
    grid: int | None = None,
    layers: Sequence[int] = (),
    decoder: str | None = None,
    statistics: str | None = None,
    keys: tuple[str, str] = ("encoder.network", "encoder.weights"),
) -> Autoencoder:
    """An autoencoder from files, on the CPU in float32; under torch.device("meta") its shapes alone.

    encoder, weights, layers: as `load_encoder` takes them; with None the encoder is the one that the decoder's folder
    holds, if any. grid: n, latent tokens a side; None for the decoder's. decoder: a folder of `pixelgen decoder`, or a
    published file; None for none. statistics: a file of `pixelgen latents`, or a published one; None standardises
    nothing. keys: the settings that hold the encoder's name and weights, for messages.

    The pixels of a published decoder have its encoder's mean and deviation, of RAEv2's, which comes with `layers`,
    none. Raises InputError for files that cannot be read or are of different latents, and what `load_encoder` raises.
    """
    if encoder is None and decoder is not None and (own := own_encoder(decoder)) is not None:
        encoder, weights, layers = own
        grid = grid or read_about(hub.local(decoder))["grid"]
    if encoder is not None and grid is None:
        raise ValueError("grid is needed, the latents a side, where an encoder is named")
    part = None if encoder is None else load_encoder(encoder, weights, grid, layers, keys)
    channels = part.channels if part is not None and not part.layers else None
    return Autoencoder(
        part,
        None if decoder is None else load_decoder(decoder, channels),
        None if statistics is None else read_statistics(statistics, part),
    )


def import_decoder(file: str, out: Path, encoder: str, weights: str | None, layers: Sequence[int] = ()) -> Autoencoder:
    """Write a published decoder and the encoder that it belongs to as a decoder's folder; returns what is read back.

    encoder, weights, layers: as `load_encoder` takes them. Raises InputError for a folder that holds something, and
    what `load_autoencoder` raises.
    """
    if out.exists() and any(out.iterdir()):
        raise InputError(f"{out}: exists and is not empty; choose another folder or remove it")
    grid = load_decoder(file).grid
    rae = load_autoencoder(
        encoder, weights, grid=grid, layers=layers, decoder=file, keys=("--encoder", "--encoder-weights")
    )
    about = {"encoder": {"network": encoder, "layers": list(layers)}, "data": {"image_size": rae.decoder.image_size}}
    with tempfile.TemporaryDirectory() as folder:
        copy_encoder(encoder, weights, Path(folder))
        save_decoder(out, rae.decoder, about, encoder=Path(folder))
    return load_autoencoder(None, decoder=str(out))


def _latent_shape(encoder: Encoder | None, decoder: Decoder | None) -> tuple[int, int, int]:
    encoded = None if encoder is None else (encoder.width, encoder.grid, encoder.grid)
    decoded = None if decoder is None else (decoder.latent_dim, decoder.grid, decoder.grid)
    if encoded and decoded and encoded != decoded:
        raise InputError(
            f"the encoder gives latents {list(encoded)} and the decoder takes {list(decoded)}; name two that fit"
        )
    return encoded or decoded
