"""An autoencoder small enough for tests: a random DINOv3 on 16 x 16 pixels, its decoder, random statistics."""

from pathlib import Path
from typing import Any

import torch
from support.teachers import write_teacher

from pixelgen_fast.rae.decoder import Decoder, DecoderSettings
from pixelgen_fast.rae.encoder import load_encoder
from pixelgen_fast.rae.files import Statistics, save_decoder, write_statistics

NETWORK = "vit_small_patch16_dinov3"
GRID = 4


def write_autoencoder(folder: Path) -> dict[str, Any]:
    """Write its files below a folder; returns the arguments with which `load_autoencoder` reads them.

    Latents are [48, 4, 4].
    """
    weights = str(write_teacher(folder / "encoder", NETWORK))
    encoder = load_encoder(NETWORK, weights, GRID)
    generator = torch.Generator().manual_seed(0)
    settings = DecoderSettings(hidden_size=16, depth=1, num_heads=2, ffn=24, patch_size=4)
    decoder = Decoder(settings, encoder.width, GRID, mean=[0.4] * 3, std=[0.3] * 3)
    with torch.no_grad():
        for p in decoder.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=generator))
    save_decoder(folder / "decoder", decoder, {})
    shape = (encoder.width, GRID, GRID)
    statistics = Statistics(torch.randn(shape, generator=generator), torch.rand(shape, generator=generator) + 0.5)
    write_statistics(folder / "statistics.safetensors", statistics, {"encoder": encoder.fingerprint()})
    return {
        "encoder": NETWORK,
        "weights": weights,
        "grid": GRID,
        "decoder": str(folder / "decoder"),
        "statistics": str(folder / "statistics.safetensors"),
    }
