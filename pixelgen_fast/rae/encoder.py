"""The frozen encoder of RAE: an image's patch tokens after the last norm, without that norm's weight and bias.

    x = (resize(image) - mean) / std                  bicubic, no antialiasing, where the image has another size
    z = LN(blocks(x))                                 no weight, no bias; class and register tokens are dropped
    z = mean over K blocks k of LN(block_k) + mean over tokens of the last of them          with `layers`, RAEv2's

(arXiv 2510.11690 and 2605.18324.) The table of learned positions is resized to n x n bicubically in float32: with
antialiasing as DINOv2 does, for MAE and SigLIP without. timm makes the networks. RAE's are

    vit_base_patch14_reg4_dinov2.lvd142m   vit_base_patch16_224.mae   vit_base_patch16_siglip_256.v2_webli

and RAEv2's is vit_large_patch16_dinov3.lvd1689m with layers 11, 13, ... 23.
Shapes: B images, S pixels a side, n patches a side, C channels, the network's width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from pixelgen_fast.diffusion.path import widen
from pixelgen_fast.dino.network import block_outputs, copy_dino, embed_patches, load_dino, rotary_table
from pixelgen_fast.errors import InputError
from pixelgen_fast.layers import Float32Tables
from pixelgen_fast.rae.names import encoder_to_timm

# of timm.create_model, by a part of the network's name: what Hugging Face's code has, and no pooling head
_CHANGES = {
    "siglip": {"global_pool": "", "act_layer": "gelu_tanh"},
    "mae": {"norm_layer": partial(nn.LayerNorm, eps=1e-12)},
}
_PLAIN_RESIZE = ("mae", "siglip")


class Encoder(Float32Tables):
    """forward(images [B, 3, S, S] in [0, 1]) -> z [B, C, n, n] in float32 or wider, not standardised.

    network: as `load_encoder` gives; it is set to its input size, and changed, in place. It takes no gradient and stays
    in evaluation mode; a gradient passes through it to the images. grid: n. layers: numbers of the blocks, counted
    from 0, whose mean is taken; none: the last block's alone. antialias: how positions are resized.

    width: C. side: pixels of the network's input. channels: mean and deviation of its three channels.
    Raises InputError for a block that there is not.
    """

    def __init__(self, network: nn.Module, grid: int, layers: Sequence[int] = (), *, antialias: bool = True) -> None:
        super().__init__()
        depth = len(network.blocks)
        if wrong := [k for k in layers if not 0 <= k < depth]:
            raise InputError(f"encoder.layers has {wrong[0]}, and the encoder has blocks 0 to {depth - 1}")
        self.grid, self.width, self.prefix = grid, network.num_features, network.num_prefix_tokens
        self.layers = tuple(sorted(layers))
        self.side = grid * network.patch_embed.patch_size[0]
        set_grid(network, grid, antialias)
        self.eps = network.norm.eps
        network.norm = nn.Identity()
        self.network = network.requires_grad_(False)
        self.channels = tuple([float(v) for v in network.pretrained_cfg[name]] for name in ("mean", "std"))
        for name, value in zip(("mean", "std"), self.channels, strict=True):
            self.register_buffer(name, torch.tensor(value)[:, None, None], persistent=False)
        self.register_buffer("rope", rotary_table(network, grid), persistent=False)
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        tokens = embed_patches(self.network, self.preprocess(images))
        kept = {*self.layers} or {len(self.network.blocks) - 1}
        maps = [
            self.normed(output)
            for number, output in enumerate(block_outputs(self.network, tokens, self.rope))
            if number in kept
        ]
        z_BLC = maps[0]
        if self.layers:
            z_BLC = torch.stack(maps).mean(dim=0) + maps[-1].mean(dim=1, keepdim=True)
        return rearrange(z_BLC, "B (h w) C -> B C h w", h=self.grid)

    def preprocess(self, images: Tensor) -> Tensor:
        """[B, 3, S, S] in [0, 1] -> what the network takes, [B, 3, side, side]. Nothing is clipped."""
        x = widen(images)
        if x.shape[-2:] != (self.side, self.side):
            x = F.interpolate(x, size=(self.side, self.side), mode="bicubic", align_corners=False)
        return ((x - self.mean) / self.std).to(self.network.patch_embed.proj.weight.dtype)

    def normed(self, tokens: Tensor) -> Tensor:
        """The last norm without its weight and bias, of the patch tokens."""
        x = widen(tokens[:, self.prefix :])
        return F.layer_norm(x, x.shape[-1:], eps=self.eps)

    def train(self, mode: bool = True) -> Encoder:
        """Stays in evaluation mode, whatever is asked."""
        return super().train(False)

    def fingerprint(self) -> str:
        """A checksum of all that z depends on beside the image, of the weights in the type that they have."""
        settings = [self.grid, self.layers, self.eps, self.channels]
        digest = hashlib.sha256(repr(settings).encode())
        for name, value in self.network.state_dict().items():
            digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy())
        return digest.hexdigest()


def load_encoder(
    name: str,
    weights: str | None,
    grid: int,
    layers: Sequence[int] = (),
    keys: tuple[str, str] = ("encoder.network", "encoder.weights"),
) -> Encoder:
    """The encoder of timm's network `name`, on the CPU in float32.

    weights: as `load_dino` takes them, in the names of timm, Meta or Hugging Face; also MAE's and SigLIP's. grid: n.
    layers: see Encoder. keys: the settings that hold name and weights, for messages. Raises what `load_dino` raises.
    """
    network = load_dino(name, weights, keys, **_reading(name))
    return Encoder(network, grid, layers, antialias=not any(part in name for part in _PLAIN_RESIZE))


def copy_encoder(name: str, weights: str | None, folder: str | Path) -> None:
    """Write the network of an encoder as a folder that can be its weights. Raises as `load_dino` and writing do."""
    copy_dino(name, weights, folder, **_reading(name))


def _reading(name: str) -> dict[str, Any]:
    """How `load_dino` reads the network: names of all families, files without what an encoder leaves away, and what is
    made otherwise than timm has it."""
    changes = next((kwargs for part, kwargs in _CHANGES.items() if part in name), {})
    return dict(rename=encoder_to_timm, optional=("norm.weight", "norm.bias"), **changes)


def set_grid(network: nn.Module, grid: int, antialias: bool) -> None:
    """Set timm's network to grid x grid patches, in place, and resize its learned positions if it has any."""
    side, before = grid * network.patch_embed.patch_size[0], network.patch_embed.grid_size
    table = network.pos_embed
    network.set_input_size(img_size=(side, side))
    if table is not None:
        prefix = 0 if network.no_embed_class else network.num_prefix_tokens
        resized = resized_positions(table, before, grid, prefix, antialias)
        network.pos_embed = nn.Parameter(resized, requires_grad=table.requires_grad)


def resized_positions(table: Tensor, before: Sequence[int], grid: int, prefix: int, antialias: bool = True) -> Tensor:
    """Learned positions [1, prefix + h w, D] of h x w patches for grid x grid; differentiable. before: (h, w)."""
    from timm.layers import resample_abs_pos_embed

    return resample_abs_pos_embed(
        table, (grid, grid), tuple(before), prefix, interpolation="bicubic", antialias=antialias, align_corners=False
    )
