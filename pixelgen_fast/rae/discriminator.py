"""The discriminator of the decoder's training: a frozen DINO and small heads on its tokens (StyleGAN-T, VAR).

    tokens = DINO(resize((x + 1) / 2)), after each tapped block, without class and registers    [B, T, D]
    logits = leave(h),  h <- a(norm(enter(tokens))),  h <- (a(norm(mix(h))) + h) / sqrt(2),  a = LeakyReLU(0.2)

enter and leave read one token and mix nine, circularly padded; each is a convolution with a spectral norm, W /
sigma(W). norm standardises each channel of an image over its tokens. The first head reads the last block again.
Gradients pass through the DINO, whose keys have no bias, to the image.

    hinge     d = (mean relu(1 - D(real)) + mean relu(1 + D(fake))) / 2,   g = -mean D(fake)
    lambda    ||dL_rec/dW|| / (||dL_gan/dW|| + 1e-6), at most 1e4,  W the decoder's last weight   (arXiv 2012.09841)

Shapes: B images [B, 3, S, S] in [-1, 1], T tokens, D width, K taps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from pixelgen_fast.dino.network import block_outputs, embed_patches, load_dino, rotary_table
from pixelgen_fast.errors import InputError
from pixelgen_fast.layers import Float32Tables

NORM_EPS, SPECTRAL_EPS, WEIGHT_EPS = 1e-6, 1e-12, 1e-6
LARGEST_WEIGHT = 1e4
SLOPE = 0.2
MIXED_TOKENS = 9


class Backbone(Float32Tables):
    """The frozen DINO: forward(x [B, 3, S, S] in [-1, 1]) -> K + 1 maps [B, D, T], the last block's first.

    network: as `load_dino` gives, changed in place: its GELU becomes the tanh form and its keys lose their bias. It
    sees images of its own size. taps: numbers of the blocks that are read, from 0; none: four, evenly spread.
    """

    def __init__(self, network: nn.Module, taps: Sequence[int] = ()) -> None:
        super().__init__()
        depth = len(network.blocks)
        count = min(4, depth)
        self.taps = tuple(taps) or tuple((k + 1) * depth // count - 1 for k in range(count))
        if wrong := [k for k in self.taps if not 0 <= k < depth]:
            raise InputError(f"discriminator.taps has {wrong[0]}, and the network has blocks 0 to {depth - 1}")
        self.width, self.prefix = network.num_features, network.num_prefix_tokens
        self.side = network.patch_embed.img_size[0]
        for block in network.blocks:
            _without_key_bias(block.attn)
            if isinstance(block.mlp.act, nn.GELU):
                block.mlp.act = nn.GELU(approximate="tanh")
        self.network = network.requires_grad_(False)
        mean, std = (torch.tensor(network.pretrained_cfg[name])[:, None, None] for name in ("mean", "std"))
        self.register_buffer("scale", 0.5 / std, persistent=False)
        self.register_buffer("shift", (0.5 - mean) / std, persistent=False)
        self.register_buffer("rope", rotary_table(network, network.patch_embed.grid_size[0]), persistent=False)
        self.eval()

    def forward(self, x: Tensor) -> list[Tensor]:
        if x.shape[-2:] != (self.side, self.side):
            x = F.interpolate(x, size=(self.side, self.side), mode="bilinear", align_corners=False)
        x = (x * self.scale + self.shift).to(self.network.patch_embed.proj.weight.dtype)
        tokens = embed_patches(self.network, x)
        maps = [
            rearrange(t[:, self.prefix :], "B T D -> B D T") for t in block_outputs(self.network, tokens, self.rope)
        ]
        return [maps[-1], *(maps[k] for k in self.taps)]

    def train(self, mode: bool = True) -> Backbone:
        """Stays in evaluation mode, whatever is asked."""
        return super().train(False)


class SpectralConv(nn.Module):
    """Conv1d over tokens with weight W / sigma(W), sigma = u W v: [B, D, T] -> [B, D', T], circularly padded.

    `renew` takes one step of the power iteration that finds u and v; a forward pass takes none. normed: a norm over
    tokens follows and takes the bias away again; it then gets no gradient, which would be nothing but rounding.
    """

    def __init__(self, width: int, out: int, size: int = 1, normed: bool = False) -> None:
        super().__init__()
        self.normed = normed
        conv = nn.Conv1d(width, out, size)
        self.weight, self.bias = conv.weight, conv.bias
        self.register_buffer("u", F.normalize(torch.randn(out), dim=0, eps=SPECTRAL_EPS))
        self.register_buffer("v", F.normalize(torch.randn(width * size), dim=0, eps=SPECTRAL_EPS))

    def forward(self, x: Tensor) -> Tensor:
        size = self.weight.shape[-1]
        with torch.autocast(x.device.type, enabled=False):
            # copies, because a renewal changes them in place while a graph may keep them
            sigma = torch.dot(self.u.clone(), self.weight.flatten(1) @ self.v.clone())
        padded = F.pad(x, (size // 2, size // 2), mode="circular") if size > 1 else x
        return F.conv1d(padded, self.weight / sigma, self.bias.detach() if self.normed else self.bias)

    @torch.no_grad()
    def renew(self) -> None:
        W = self.weight.flatten(1)
        self.v.copy_(F.normalize(W.T @ self.u, dim=0, eps=SPECTRAL_EPS))
        self.u.copy_(F.normalize(W @ self.v, dim=0, eps=SPECTRAL_EPS))


class TokenNorm(nn.Module):
    """Each channel of an image standardised over its tokens, then weight and bias, in float32: [B, D, T]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.instance_norm(x.float(), weight=self.weight, bias=self.bias, eps=NORM_EPS)


class Layer(nn.Module):
    """LeakyReLU(norm(conv(x)))."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.conv = SpectralConv(width, width, size, normed=True)
        self.norm = TokenNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(self.norm(self.conv(x)), SLOPE)


class Head(nn.Module):
    """[B, D, T] -> logits [B, T]."""

    def __init__(self, width: int, mixed: int) -> None:
        super().__init__()
        self.enter = Layer(width, 1)
        self.mix = Layer(width, mixed)
        self.leave = SpectralConv(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.enter(x)
        return self.leave((self.mix(h) + h) / math.sqrt(2)).squeeze(1)


class Discriminator(nn.Module):
    """forward(x [B, 3, S, S] in [-1, 1]) -> logits [B, (K + 1) T]: high where images look real.

    Only the heads are trained, and only they are in the state dict: the backbone is kept out of the children, and moves
    and is cast with them. mixed: tokens, an odd number, that the middle convolution reads. `renew` is to be called
    before each use in the discriminator's own step.
    """

    def __init__(self, backbone: Backbone, mixed: int = MIXED_TOKENS) -> None:
        super().__init__()
        self._backbone = (backbone,)  # a module that is an attribute would become a child
        self.heads = nn.ModuleList(Head(backbone.width, mixed) for _ in range(len(backbone.taps) + 1))

    def forward(self, x: Tensor) -> Tensor:
        maps = self._backbone[0](x)
        return torch.cat([head(m.float()) for head, m in zip(self.heads, maps, strict=True)], dim=1)

    def renew(self) -> None:
        """One step of every spectral norm's power iteration."""
        for module in self.modules():
            if isinstance(module, SpectralConv):
                module.renew()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        self._backbone[0]._apply(fn, recurse)
        return super()._apply(fn, recurse)


def load_discriminator(
    name: str,
    weights: str | None,
    taps: Sequence[int] = (),
    keys: tuple[str, str] = ("discriminator.network", "discriminator.weights"),
) -> Discriminator:
    """Fresh heads on the frozen network `name` of timm, vit_small_patch8_224.dino in RAE.

    weights: as `load_dino` takes them. The heads are drawn from torch's generator. Raises what `load_dino` raises.
    """
    return Discriminator(Backbone(load_dino(name, weights, keys), taps))


def hinge_real(logits: Tensor) -> Tensor:
    """The discriminator's loss on real images; half of it counts."""
    return F.relu(1 - logits).mean()


def hinge_fake(logits: Tensor) -> Tensor:
    """The discriminator's loss on reconstructed images; half of it counts."""
    return F.relu(1 + logits).mean()


def adaptive_weight(rec_norm: Tensor, gan_norm: Tensor) -> Tensor:
    """lambda, from the norms of both losses' gradients with respect to the decoder's last weight."""
    return (rec_norm / (gan_norm + WEIGHT_EPS)).clamp(0, LARGEST_WEIGHT)


def quantised(x: Tensor) -> Tensor:
    """Images in [-1, 1] as 8-bit ones: clipped, and rounded to multiples of 1 / 127.5."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1


@torch.no_grad()
def _without_key_bias(attention: nn.Module) -> None:
    """Set the keys' third of a packed bias to 0; networks without one have none."""
    bias = getattr(attention.qkv, "bias", None)
    if bias is not None:
        third = len(bias) // 3
        bias[third : 2 * third] = 0
