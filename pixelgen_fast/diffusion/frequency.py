"""DeCo's frequency loss: the error of the velocity by JPEG block frequencies (arXiv 2511.19365).

    d      = YCbCr(v_hat - v) in blocks of 8 x 8 pixels, luma and chroma without offset
    D      = orthonormal two-dimensional DCT-II of each block
    loss_b = mean of w D^2 over channels, blocks and frequencies;    w = (1 / Q) / mean(1 / Q)

Q is JPEG's quantisation table (ITU-T T.81, annex K) at a quality, luminance for Y and chrominance for Cb and Cr: what
JPEG rounds coarsely, because the eye hardly sees it, counts little. A weight is 1 on average over a table.
Shapes: B images of 3 x H x W pixels; k, l frequencies of a block, i, j its pixels.
"""

from __future__ import annotations

import functools
import math

import torch
from einops import rearrange
from torch import Tensor

from pixelgen_fast.diffusion.path import widen

BLOCK = 8

# R, G, B -> Y, Cb, Cr of JFIF (ITU-R BT.601), linear
YCBCR = (
    (0.299, 0.587, 0.114),
    (-0.168736, -0.331264, 0.5),
    (0.5, -0.418688, -0.081312),
)

# rows are vertical frequencies
LUMINANCE = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
CHROMINANCE = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
    (99, 99, 99, 99, 99, 99, 99, 99),
    (99, 99, 99, 99, 99, 99, 99, 99),
    (99, 99, 99, 99, 99, 99, 99, 99),
    (99, 99, 99, 99, 99, 99, 99, 99),
)


def frequency_loss(predicted_velocity: Tensor, true_velocity: Tensor, quality: int = 85) -> Tensor:
    """Error of each image, [B] in float32 or wider.

    predicted_velocity, true_velocity: [B, 3, H, W], any float dtype. quality: JPEG's, 1 to 100.
    Raises ValueError for other shapes, for H or W that is no multiple of 8, and for a quality out of its range.
    """
    shape = predicted_velocity.shape
    if len(shape) != 4 or shape[1] != 3 or shape != true_velocity.shape:
        raise ValueError(
            "the frequency loss compares two velocities [B, 3, H, W], "
            f"got {list(shape)} and {list(true_velocity.shape)}"
        )
    if shape[2] % BLOCK or shape[3] % BLOCK:
        raise ValueError(
            f"images of {shape[2]} x {shape[3]} pixels do not divide into blocks of 8 x 8 for the frequency loss; "
            "choose data.image_size as a multiple of 8, or objective.frequency_weight=0"
        )
    # Everything up to the square is linear: the difference goes through it once.
    error = widen(predicted_velocity) - widen(true_velocity)
    ycbcr, weights = _constants(quality, error.device, error.dtype)
    coefficients = block_dct(torch.einsum("yc,BcHW->ByHW", ycbcr, error))
    return torch.einsum("BCklhw,Ckl->B", coefficients.square(), weights) / error[0].numel()


def block_dct(x: Tensor) -> Tensor:
    """Orthonormal DCT-II of every 8 x 8 block: [B, C, H, W] -> [B, C, k, l, H / 8, W / 8]."""
    basis = dct_matrix(x.device, x.dtype)
    blocks = rearrange(x, "B C (h i) (w j) -> B C h i w j", i=BLOCK, j=BLOCK)
    return torch.einsum("ki,lj,BChiwj->BCklhw", basis, basis, blocks)


@functools.lru_cache(maxsize=8)
def dct_matrix(device: torch.device, dtype: torch.dtype) -> Tensor:
    """The orthonormal DCT-II of 8 numbers [k, i]: sqrt(2 / 8) cos(pi (2 i + 1) k / 16), the row k = 0 over sqrt(2)."""
    i = torch.arange(BLOCK, dtype=torch.float64)
    matrix = math.sqrt(2 / BLOCK) * torch.cos(torch.pi * (2 * i + 1) * i[:, None] / (2 * BLOCK))
    matrix[0] /= math.sqrt(2)
    return matrix.to(device, dtype)


def quantisation_table(base: tuple[tuple[int, ...], ...], quality: int) -> Tensor:
    """A base table at a quality as the JPEG group's library scales it: int64 [k, l], between 1 and 255."""
    if not 1 <= quality <= 100:
        raise ValueError(f"JPEG quality must be from 1 to 100, got {quality}")
    scale = 200 - 2 * quality if quality >= 50 else 5000 // quality
    return ((torch.tensor(base) * scale + 50) // 100).clamp(1, 255)


def frequency_weights(quality: int) -> Tensor:
    """Weights of the squared coefficients of Y, Cb and Cr, float64 [3, k, l], each table 1 on average."""
    tables = torch.stack([quantisation_table(base, quality) for base in (LUMINANCE, CHROMINANCE, CHROMINANCE)])
    inverse = 1 / tables.double()
    return inverse / inverse.mean(dim=(1, 2), keepdim=True)


@functools.lru_cache(maxsize=8)
def _constants(quality: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The colour matrix and the weights, on the device once: a copy in each step would make the host wait."""
    return torch.tensor(YCBCR, dtype=torch.float64).to(device, dtype), frequency_weights(quality).to(device, dtype)
