"""The frozen teacher of feature alignment: a DINOv2 or DINOv3 vision transformer.

    features = norm(blocks(patches(resize((image / 255 - mean) / std))))       patch tokens only

as REPA prepares its images (arXiv 2410.06940, section 4): normalise, then resize (bicubic, no antialiasing), so that
the teacher has as many patches a side as the generator. A DINOv2 of patch 14 sees 224 pixels of a 256-pixel image whose
generator has 16 x 16 tokens.

Shapes: B images, S x S pixels, n patches a side, L = n n tokens in row-major order, D the teacher's width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


class Teacher(nn.Module):
    """A frozen vision transformer with its own preprocessing: forward(images uint8 [B, S, S, 3]) -> [B, L, D].

    network: as `load_dino` gives; it is moved, cast and set to its input size in place. grid: patches a side. It runs
    in bf16 on a GPU and on meta, which stands for one, with rotary tables in fp32, and in fp32 on a CPU. compile:
    compile the network.
    It never trains and takes no gradient. width: D. side: pixels of its input.
    """

    def __init__(self, network: nn.Module, grid: int, device: torch.device | str, *, compile: bool = False) -> None:
        super().__init__()
        device = torch.device(device)
        self.grid, self.width, self.prefix = grid, network.num_features, network.num_prefix_tokens
        self.dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        self.side = grid * network.patch_embed.patch_size[0]
        network.set_input_size(img_size=(self.side, self.side))
        self.network = cast_network(network, device, self.dtype).requires_grad_(False).eval()
        self.mean, self.std = (
            torch.tensor(network.pretrained_cfg[key], device=device)[:, None, None] for key in ("mean", "std")
        )
        features: Callable[[Tensor], Tensor] = self.network.forward_features
        self.features = torch.compile(features) if compile else features

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        return self.features(self.preprocess(images))[:, self.prefix :]

    def preprocess(self, images: Tensor) -> Tensor:
        """uint8 [B, S, S, 3] -> what the network takes, [B, 3, side, side]."""
        x = (rearrange(images, "B H W C -> B C H W").float() / 255 - self.mean) / self.std
        return F.interpolate(x, size=(self.side, self.side), mode="bicubic").to(self.dtype)

    def train(self, mode: bool = True) -> Teacher:
        """Stays in evaluation mode, whatever is asked."""
        return super().train(False)

    def fingerprint(self) -> str:
        """A checksum of all that its features depend on beside the image: weights, dtype, grid, normalisation."""
        digest = hashlib.sha256(repr([self.grid, self.mean.tolist(), self.std.tolist()]).encode())
        for name, value in self.network.named_parameters():
            digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy())
        return digest.hexdigest()


def cast_network(network: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Move and cast, except that rotary tables keep float32: their angles need the digits."""
    tables = [
        (module, name, table)
        for path, module in network.named_modules()
        for name, table in module.named_buffers(recurse=False)
        if "rope" in path
    ]
    network.to(device, dtype)
    for module, name, table in tables:
        setattr(module, name, table.to(device))
    return network
