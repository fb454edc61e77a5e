"""The losses of a decoder's training, up to their gradients at the decoded image.

    z     = encoder(x) + sigma n,  sigma = tau u for each image, n normal        not standardised: that would cancel
    r     = decoder(z)                                                            x and r in [0, 1]
    L_rec = mean |r - x| + w LPIPS(2 r - 1, 2 x - 1)
    L_gan = -mean D(augment(2 r - 1))

    discriminator: (mean relu(1 + D(augment(fake))) + mean relu(1 - D(augment(2 x - 1)))) / 2,
                   fake = 2 decoder(encoder(x)) - 1 in 8 bits, of the decoder that has just learned

(arXiv 2510.11690.) Crop, sigma, n and what augments are functions of (seed, image number).
Shapes: B images of one micro-batch, S x S pixels, cut out of R x R.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import ClassVar, NamedTuple

import torch
from pixelgen_kernels import philox
from torch import Tensor, nn

from pixelgen_fast.data import Batch
from pixelgen_fast.decoding.augment import FOR_DECODER, augment, random_crop
from pixelgen_fast.decoding.perceptual import Perceptual
from pixelgen_fast.decoding.schema import DecoderConfig
from pixelgen_fast.diffusion.path import to_fractions
from pixelgen_fast.diffusion.time import noise
from pixelgen_fast.rae.decoder import Decoder
from pixelgen_fast.rae.discriminator import Discriminator
from pixelgen_fast.rae.encoder import Encoder

# of the columns: what L_gan is multiplied with, w lambda, and the share of logits on the right side of 0
NO_LOSSES = ("gan_scale", "discriminator_accuracy")


class AtImage(NamedTuple):
    """Of one micro-batch: means L1, LPIPS and L_gan, detached, and the gradients of L_rec and L_gan at r."""

    l1: Tensor
    perceptual: Tensor
    gan: Tensor
    rec_grad: Tensor
    gan_grad: Tensor | None


class DecoderObjective(nn.Module):
    """The networks of a training and its losses. discriminator, perceptual: None where their weights are 0.

    columns: what a row of metrics has beside the loss, which is L_rec; see step.py.
    """

    columns: ClassVar[tuple[str, ...]] = ("l1", "lpips", "gan", "gan_scale", "discriminator", "discriminator_accuracy")
    alignment: ClassVar[None] = None

    def __init__(
        self,
        config: DecoderConfig,
        encoder: Encoder,
        decoder: Decoder,
        discriminator: Discriminator | None,
        perceptual: Perceptual | None,
        precision: str,
    ) -> None:
        super().__init__()
        self.settings, self.seed, self.size = config.objective, config.run.seed, config.data.image_size
        self.augments, self.bf16 = config.discriminator.augment, precision == "bf16"
        self.encoder, self.decoder, self.discriminator, self.perceptual = encoder, decoder, discriminator, perceptual

    def crop(self, batch: Batch) -> Tensor:
        """Training images of a micro-batch uint8 [B, R, R, 3]: float32 [B, 3, S, S] in [0, 1]."""
        images = to_fractions(batch.images)
        return random_crop(images, self.size, self.seed, batch.numbers)

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """Latents of images x, without noise."""
        with self.precise():
            return self.encoder(x)

    def noised(self, z: Tensor, numbers: Tensor) -> Tensor:
        """Latents with the noise of their images."""
        if not self.settings.latent_noise:
            return z
        sigma = self.settings.latent_noise * philox.uniform(self.seed, numbers, philox.TIME, 1)
        return z + sigma[:, :, None, None] * noise(self.seed, numbers, z.shape[1:])

    def features(self, z: Tensor) -> Tensor:
        """What the decoder's last layer reads, in float32."""
        with self.precise():
            return self.decoder.features(z).float()

    def at_image(self, r: Tensor, x: Tensor, numbers: Tensor, gan: bool) -> AtImage:
        """The losses of decoded images r, and their gradients there. gan: whether the discriminator is asked."""
        r = r.detach().requires_grad_()
        l1 = (r - x).abs().mean()
        perceptual = self.distance(r, x)
        (rec_grad,) = torch.autograd.grad(l1 + self.settings.perceptual_weight * perceptual, r)
        adversarial, gan_grad = torch.zeros_like(l1), None
        if gan:
            adversarial = -self.judge(2 * r - 1, numbers, FOR_DECODER).mean()
            (gan_grad,) = torch.autograd.grad(adversarial, r)
        return AtImage(l1.detach(), perceptual.detach(), adversarial.detach(), rec_grad, gan_grad)

    def distance(self, r: Tensor, x: Tensor) -> Tensor:
        """Mean LPIPS of images in [0, 1]; 0 where it has no weight."""
        if self.perceptual is None:
            return r.new_zeros(())
        with self.precise():
            return self.perceptual(2 * r - 1, 2 * x - 1).mean()

    def judge(self, x: Tensor, numbers: Tensor, stream: int) -> Tensor:
        """The discriminator's logits of images in [-1, 1], augmented by what their numbers draw from a stream."""
        seen = augment(x, self.seed, numbers, stream) if self.augments else x
        with self.precise():
            return self.discriminator(seen).float()

    def precise(self) -> AbstractContextManager:
        """The precision of the large products."""
        return torch.autocast(next(self.decoder.parameters()).device.type, torch.bfloat16, enabled=self.bf16)
