"""The last level of FractalGen (arXiv 2502.17437): red, green and blue of a pixel, one after another.

    tokens  = [W c, codes_red[R], codes_green[G]]          R, G, B = round(255 (x std + mean)) in 0..255
    logits  = LayerNorm(causal blocks(LayerNorm(tokens))) codes_channel^T + bias_channel                in float32
    loss    = (w CE_red + CE_green + CE_blue) / (w + 2)
    guided  = u + s (c - u);   where softmax(c) < threshold, u is first raised to max(u, c - max(c) + max(u))

x are images in ImageNet's normalised units. Shapes: M pixels, V = 256 values, D' width of the condition, W width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixelgen_fast.layers import small_
from pixelgen_fast.models.fractal_blocks import LAYER_NORM_EPS, ColorBlock

VALUES = 256
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class PixelNetwork(nn.Module):
    """forward(cond [M, D'], before int64 [M, n]) -> logits float32 [M, n + 1, V] of channels 0 to n, n up to 2."""

    def __init__(self, above: int, dim: int, depth: int, num_heads: int) -> None:
        super().__init__()
        self.cond_embed = nn.Linear(above, dim)
        # a row for each value of each channel, which embeds it and scores it
        self.codes = nn.Parameter(torch.empty(3, VALUES, dim))
        self.bias = nn.Parameter(torch.empty(3, VALUES))
        self.embed_norm = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.blocks = nn.ModuleList(ColorBlock(dim, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)

    def initialise(self) -> None:
        small_(self.codes)
        nn.init.zeros_(self.bias)

    def forward(self, cond: Tensor, before: Tensor) -> Tensor:
        known = [F.embedding(before[:, c], self.codes[c]) for c in range(before.shape[1])]
        x = self.embed_norm(torch.stack([self.cond_embed(cond), *known], dim=1))
        for block in self.blocks:
            x = block(x)
        channels = x.shape[1]
        wide = torch.promote_types(x.dtype, torch.float32)
        h, codes, bias = (tensor.to(wide) for tensor in (self.norm(x), self.codes[:channels], self.bias[:channels]))
        return torch.einsum("mcw,cvw->mcv", h, codes) + bias


def normalise(values: Tensor) -> Tensor:
    """Values 0 to 255 as the networks read them: (v / 255 - mean) / std. [..., 3, p, p] -> float32."""
    channels = zip(values.float().unbind(-3), MEAN, STD, strict=True)
    return torch.stack([(v / 255 - mean) / std for v, mean, std in channels], dim=-3)


def to_values(x_M3: Tensor, noise_M3: Tensor | float = 0.0) -> Tensor:
    """Normalised colors as int64 values 0 to 255: round(255 (x std + mean) + noise).

    The mean color of a crop often lies halfway between two values: a little noise rounds it to either.
    """
    channels = zip(x_M3.detach().unbind(1), MEAN, STD, strict=True)
    exact_M3 = torch.stack([255 * (x * std + mean) for x, mean, std in channels], dim=1)
    return (exact_M3 + noise_M3).round().clamp(0, VALUES - 1).long()


def pixel_loss(logits_M3V: Tensor, values_M3: Tensor, red_weight: float = 1.0) -> Tensor:
    """Cross-entropy of each pixel [M] in nats, the mean of its channels, of which red may count for more."""
    losses = F.cross_entropy(logits_M3V.flatten(0, 1), values_M3.flatten(), reduction="none")
    red, green, blue = losses.view(-1, 3).unbind(1)
    return (red_weight * red + green + blue) / (red_weight + 2)


def guided(cond: Tensor, none: Tensor, scale: float, threshold: float) -> Tensor:
    """Logits [..., V] led away from those without a class. threshold: the probability below which a value is rare.

    A rare value must not be led to only because it is rarer without a class.
    """
    raised = torch.maximum(none, cond - cond.amax(-1, keepdim=True) + none.amax(-1, keepdim=True))
    none = torch.where(cond.softmax(-1) < threshold, raised, none)
    return none + scale * (cond - none)


def pick(logits_MV: Tensor, u_M: Tensor) -> Tensor:
    """The value, int64 [M], whose part of the cumulated probabilities a uniform number in (0, 1) falls into."""
    below = logits_MV.double().softmax(-1).cumsum(-1)[:, :-1]
    return (below <= u_M.double()[:, None]).sum(-1)
