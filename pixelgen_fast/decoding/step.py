"""One training step of the decoder and its discriminator, alike on any number of ranks and of micro-batches.

    decoder         dL_rec/dr + w lambda dL_gan/dr, carried back from the decoded images r, then AdamW and averages
    lambda          from ||dL_rec/dW|| and ||dL_gan/dW|| over the global batch, W the decoder's last weight
    discriminator   spectral norms renewed, its loss on fakes; renewed again, its loss on real images; then AdamW

lambda is known only once every micro-batch has been seen. With one micro-batch the decoder's graph waits for it; with
more, images are decoded again, which is less work than two backward passes, and what is kept meanwhile are images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pixelgen_fast.data import Batch
from pixelgen_fast.decoding.augment import OF_FAKES, OF_REALS
from pixelgen_fast.decoding.objective import AtImage, DecoderObjective
from pixelgen_fast.decoding.pair import DECODER, DISCRIMINATOR, PairEngine
from pixelgen_fast.decoding.schema import DecoderConfig, Optimizer
from pixelgen_fast.rae.discriminator import adaptive_weight, hinge_fake, hinge_real, quantised


class Plan(NamedTuple):
    """Of one step: whether the decoder hears of the discriminator, whether that one learns, and both rates."""

    gan: bool
    discriminates: bool
    decoder_lr: float
    discriminator_lr: float


def plan(config: DecoderConfig, nimg: int, total: int) -> Plan:
    """The step that begins at image `nimg` of `total`. The discriminator's rate begins when it does."""
    o, p, batch = config.objective, config.optimizer, config.train.global_batch
    discriminates = o.gan_weight > 0 and nimg >= o.discriminator_from
    since = max(nimg - o.discriminator_from, 0)
    return Plan(
        gan=o.gan_weight > 0 and nimg >= o.gan_from,
        discriminates=discriminates,
        decoder_lr=rate(p, p.lr, nimg, batch, total),
        discriminator_lr=rate(p, config.discriminator.lr, since, batch, total),
    )


def rate(settings: Optimizer, lr: float, nimg: int, batch: int, total: int) -> float:
    """lr (n + batch) / warmup up to warmup images, then half a cosine from lr to last_share lr at `total`."""
    warmup, last = settings.warmup_images, settings.last_share
    if nimg < warmup:
        return lr * min((nimg + batch) / warmup, 1.0)
    progress = min((nimg - warmup) / max(total - warmup, 1), 1.0)
    return lr * (last + (1 - last) * 0.5 * (1 + math.cos(math.pi * progress)))


def decoder_step(
    engine: PairEngine,
    objective: DecoderObjective,
    batches: Sequence[Batch],
    plan: Plan,
    at: Callable[[str], object] = lambda part: None,
) -> Tensor:
    """Both sides' step on the micro-batches of this rank. at: told which part begins.

    Returns float32 [2 + columns] on the device: how many micro-batches had a finite loss, the sum of their L_rec, and
    of each of the objective's columns.
    """
    at("encoder")
    images = [objective.crop(batch) for batch in batches]
    latents = [objective.encode(x) for x in images]
    losses, scale = _train_decoder(engine, objective, batches, images, latents, plan, at)
    hinge, accuracy = torch.zeros(2, device=scale.device)
    if plan.discriminates:
        at("discriminator")
        hinge, accuracy = _train_discriminator(engine, objective, batches, images, latents, plan)
    sums = torch.zeros(2 + len(objective.columns), device=scale.device)
    for loss in losses:
        rec = loss.l1 + objective.settings.perceptual_weight * loss.perceptual
        row = torch.stack([torch.ones_like(rec), rec, loss.l1, loss.perceptual, loss.gan, scale, hinge, accuracy])
        sums += torch.where(torch.isfinite(rec), row, 0.0)
    return sums


def _train_decoder(
    engine: PairEngine,
    objective: DecoderObjective,
    batches: Sequence[Batch],
    images: list[Tensor],
    latents: list[Tensor],
    plan: Plan,
    at: Callable[[str], object],
) -> tuple[list[AtImage], Tensor]:
    """Returns the losses of each micro-batch, and what L_gan's gradient was multiplied with."""
    at("decoder")
    decoder, once = objective.decoder, len(batches) == 1 or not plan.gan
    W = decoder.head.weight
    losses, last = [], W.new_zeros(2, *W.shape)
    scale = W.new_zeros(())
    for batch, x, z in zip(batches, images, latents, strict=True):
        with torch.set_grad_enabled(once):
            features = objective.features(objective.noised(z, batch.numbers))
        r = decoder.images(features.detach())
        found = objective.at_image(r, x, batch.numbers, plan.gan)
        losses.append(found)
        if plan.gan:
            grads = (found.rec_grad, found.gan_grad)
            last += torch.stack([torch.autograd.grad(r, W, g, retain_graph=True)[0] for g in grads])
        elif once:
            _carry_back(decoder.images(features), found, scale, len(batches))
    if not plan.gan:
        engine.update(DECODER, plan.decoder_lr)
        return losses, scale
    engine.average([last])
    scale = objective.settings.gan_weight * adaptive_weight(*(g.norm() / len(batches) for g in last))
    for batch, z, found in zip(batches, latents, losses, strict=True):
        if not once:
            features = objective.features(objective.noised(z, batch.numbers))
        _carry_back(decoder.images(features), found, scale, len(batches))
    engine.update(DECODER, plan.decoder_lr)
    return losses, scale


def _carry_back(r: Tensor, found: AtImage, scale: Tensor, batches: int) -> None:
    """Add the gradient of the total loss, a mean over so many micro-batches, from images r to the decoder's weights."""
    grad = found.rec_grad if found.gan_grad is None else found.rec_grad + scale * found.gan_grad
    # a loss that is not finite must not pass as a step, even if its gradient happens to be
    finite = torch.isfinite(found.l1 + found.perceptual + found.gan)
    r.backward(grad * torch.where(finite, 1.0 / batches, torch.nan))


def _train_discriminator(
    engine: PairEngine,
    objective: DecoderObjective,
    batches: Sequence[Batch],
    images: list[Tensor],
    latents: list[Tensor],
    plan: Plan,
) -> tuple[Tensor, Tensor]:
    """Returns the mean hinge loss, and the share of logits on the right side of 0."""
    discriminator = objective.discriminator
    hinge, right = torch.zeros(2, device=images[0].device)
    with torch.no_grad():
        fakes = [quantised(2 * objective.decoder.images(objective.features(z)) - 1) for z in latents]
    reals = [2 * x - 1 for x in images]
    for seen, stream, loss_of, sign in ((fakes, OF_FAKES, hinge_fake, -1), (reals, OF_REALS, hinge_real, 1)):
        discriminator.renew()
        for batch, x in zip(batches, seen, strict=True):
            logits = objective.judge(x, batch.numbers, stream)
            loss = 0.5 * loss_of(logits)
            (loss / len(batches)).backward()
            hinge += loss.detach() / len(batches)
            right += (sign * logits > 0).float().mean() / (2 * len(batches))
    engine.update(DISCRIMINATOR, plan.discriminator_lr)
    return hinge, right
