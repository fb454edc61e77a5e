"""A decoder's configuration small enough for tests: random images of 16 pixels, a random encoder."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from support.teachers import write_teacher

from pixelgen_fast.decoding.schema import DecoderConfig, load

CONFIG = Path(__file__).parents[2] / "configs" / "decoder_digits.yaml"
NETWORK = "vit_small_patch16_dinov3"


def write_images(folder: Path, count: int) -> torch.Tensor:
    """Write PNG files in two classes, if there are none; returns them all, uint8 [count, 16, 16, 3]."""
    images = torch.randint(0, 256, (count, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))
    for number, image in enumerate(images.numpy()):
        path = folder / "ab"[number % 2] / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.asarray(image)).save(path)
    return images


def overrides(folder: Path) -> list[str]:
    """The settings of a small run below a folder, whose images are in folder/data and whose encoder is made here."""
    weights = folder / "encoder"
    if not weights.is_dir():
        write_teacher(weights, NETWORK)
    return [
        f"run.dir={folder / 'run'}", f"data.root={folder / 'data'}", "data.workers=0", f"encoder.network={NETWORK}",
        f"encoder.weights={weights}", f"discriminator.network={NETWORK}", f"discriminator.weights={weights}",
        "latents.batch=4", "latents.save_every_images=4", "decoder.hidden_size=16", "decoder.depth=1",
        "decoder.num_heads=2", "decoder.ffn=24", "train.global_batch=8", "train.micro_batch=4",
        "objective.perceptual_weight=0", "objective.latent_noise=0.8", "objective.gan_weight=0.75",
        "objective.discriminator_from=0", "objective.gan_from=0", "optimizer.warmup_images=0", "log.tensorboard=false",
    ]  # fmt: skip


def config_of(folder: Path, *changes: str) -> DecoderConfig:
    return load(CONFIG, [*overrides(folder), *changes])
