"""A teacher small enough for tests, of 4 x 4 patches of 16 pixels and width 48, with no weight at a special value."""

from pathlib import Path

import timm
import torch
from torch import nn

from pixelgen_fast.dino.network import save_teacher


def write_teacher(folder: Path, name: str, seed: int = 0) -> Path:
    """Save one with the architecture `name`, a DINOv2 or DINOv3 of timm, as a folder that `load_dino` reads."""
    kwargs = dict(embed_dim=48, depth=2, num_heads=2, patch_size=4, img_size=16)
    torch.manual_seed(seed)
    network = timm.create_model(name, num_classes=0, **kwargs)
    for p in network.parameters():
        nn.init.normal_(p, std=0.2)
    save_teacher(folder, network, architecture=name, kwargs=kwargs, mean=[0.4] * 3, std=[0.3] * 3)
    return folder
