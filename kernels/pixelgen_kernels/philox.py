"""Counter-based random numbers: the same bits in PyTorch, Triton and C++, on any device, in any order.

Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011), ten rounds of

    (c0, c1, c2, c3) <- (hi(B c2) ^ c1 ^ k0,  lo(B c2),  hi(A c0) ^ c3 ^ k1,  lo(A c0)),   (k0, k1) += Weyl constants

keyed by the run's seed and counted by (element // 4, image number low, image number high, stream), so that what an
image draws depends on (seed, image number) alone: not on world size, micro-batch, device or what was drawn before.

Shapes: B images, n numbers per image.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pixelgen_kernels import library

NOISE, TIME, LABEL_DROP, FLIP, SAMPLING, GROUNDING_DROP = range(6)

_MULTIPLIER_A, _MULTIPLIER_B = 0xD2511F53, 0xCD9E8D57
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF


def philox4x32(key: tuple[int, int], c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor) -> tuple[Tensor, ...]:
    """Apply Philox4x32-10 to counters.

    key: two 32-bit words. c0..c3: int64 tensors holding 32-bit words, broadcastable to each other.
    Returns four int64 tensors with values in [0, 2^32).
    """
    k0, k1 = key
    for _ in range(10):
        # A 32 x 32 bit product fits 64 bits; int64 keeps the bits and the mask removes what the signed shift smears.
        a, b = c0 * _MULTIPLIER_A, c2 * _MULTIPLIER_B
        c0, c1, c2, c3 = ((b >> 32) & _MASK) ^ c1 ^ k0, b & _MASK, ((a >> 32) & _MASK) ^ c3 ^ k1, a & _MASK
        k0, k1 = (k0 + _WEYL_0) & _MASK, (k1 + _WEYL_1) & _MASK
    return c0, c1, c2, c3


def words(seed: int, numbers: Tensor, stream: int, count: int) -> Tensor:
    """Random 32-bit words of each image.

    seed: the run's 64-bit seed. numbers: int64 [B], image numbers >= 0. stream: one of the names
    above. Returns int64 [B, count] with values in [0, 2^32).
    """
    if numbers.dtype != torch.int64 or numbers.ndim != 1:
        raise ValueError(f"numbers must be int64 [B], got {numbers.dtype} {list(numbers.shape)}")
    if library.choose_body(numbers.device.type)[0] == "native":
        signed = (seed + 2**63) % 2**64 - 2**63
        return torch.ops.pixelgen_native.random_words(signed, numbers, stream, count)
    blocks = torch.arange((count + 3) // 4, device=numbers.device)
    low, high = (numbers & _MASK)[:, None], ((numbers >> 32) & _MASK)[:, None]
    key = (seed & _MASK, (seed >> 32) & _MASK)
    quads = philox4x32(key, blocks[None, :], low, high, torch.full_like(low, stream))
    shape = (numbers.shape[0], blocks.shape[0])
    return torch.stack([q.expand(shape) for q in quads], dim=-1).flatten(1)[:, :count]


def uniform(seed: int, numbers: Tensor, stream: int, count: int) -> Tensor:
    """Uniform float32 [B, count] in the open interval (0, 1): (top 23 bits + 1/2) / 2^23, exact in float32."""
    return _unit(words(seed, numbers, stream, count))


def normal(seed: int, numbers: Tensor, stream: int, count: int) -> Tensor:
    """Standard normal float32 [B, count] by Box-Muller: words (2i, 2i+1) give the numbers (2i, 2i+1)."""
    u = _unit(words(seed, numbers, stream, count + count % 2))
    radius = torch.sqrt(-2.0 * torch.log(u[:, 0::2]))
    angle = (2.0 * math.pi) * u[:, 1::2]
    pair = torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], dim=-1)
    return pair.flatten(1)[:, :count]


def _unit(word: Tensor) -> Tensor:
    return ((word >> 9).to(torch.float32) + 0.5) * 2.0**-23
