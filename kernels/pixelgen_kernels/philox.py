"""Counter-based random numbers: the same bits in PyTorch, Triton and C++, on any device, in any order.

Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011), ten rounds of

    (c0, c1, c2, c3) <- (hi(B c2) ^ c1 ^ k0,  lo(B c2),  hi(A c0) ^ c3 ^ k1,  lo(A c0)),   (k0, k1) += Weyl constants

keyed by the run's seed and counted by (element // 4, image number low, image number high, stream), so that what an
image draws depends on (seed, image number) alone: not on world size, micro-batch, device or what was drawn before.

Shapes: B images, n numbers per image.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pixelgen_kernels.bodies import choose_body
from pixelgen_kernels.launch import Launch
from pixelgen_kernels.registration import operator
from pixelgen_kernels.tuning import chosen

NOISE, TIME, LABEL_DROP, FLIP, SAMPLING, GROUNDING_DROP = range(6)
MASK_ORDER, MASK_RATIO, CORRUPTION, CORRUPTION_LEVEL = range(6, 10)
# and the numbers above it: one stream for each step of a sampler that draws in every step
SAMPLING_STEPS = 2**16

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


def words_reference(seed: int, numbers: Tensor, stream: int, count: int) -> Tensor:
    blocks = torch.arange((count + 3) // 4, device=numbers.device)
    low, high = (numbers & _MASK)[:, None], ((numbers >> 32) & _MASK)[:, None]
    key = (seed & _MASK, (seed >> 32) & _MASK)
    quads = philox4x32(key, blocks[None, :], low, high, torch.full_like(low, stream))
    shape = (numbers.shape[0], blocks.shape[0])
    return torch.stack([q.expand(shape) for q in quads], dim=-1).flatten(1)[:, :count]


class Config(NamedTuple):
    """A program draws block_q quads of words of one image."""

    block_q: int
    num_warps: int


CONFIGS = (Config(512, 4), Config(256, 4), Config(1024, 8))


@triton.jit
def key_of(seed_low, seed_high):
    """The 64-bit seed of two 32-bit words: whole numbers of one type, so that a kernel is the same for every seed."""
    return (seed_high.to(tl.int64) << 32) | (seed_low.to(tl.int64) & 0xFFFFFFFF)


@triton.jit(do_not_specialize=["seed_low", "seed_high", "stream", "quads"])
def random_words_fwd_kernel(numbers_ptr, words_ptr, seed_low, seed_high, stream, quads, BLOCK_Q: tl.constexpr):
    blocks = tl.cdiv(quads, BLOCK_Q)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    first = (tl.program_id(0) % blocks) * BLOCK_Q
    number = tl.load(numbers_ptr + image)
    counter = (first + tl.arange(0, BLOCK_Q)).to(tl.uint32)
    zero = counter * 0
    low, high = (number & 0xFFFFFFFF).to(tl.uint32), (number >> 32).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(
        key_of(seed_low, seed_high), counter, zero + low, zero + high, zero + stream.to(tl.uint32)
    )
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [4 * BLOCK_Q])
    o = tl.arange(0, 4 * BLOCK_Q)
    tl.store(words_ptr + (image * quads + first) * 4 + o, words.to(tl.int64), mask=o < (quads - first) * 4)


@functools.cache
def plan(B: int, quads: int, config: Config) -> Launch:
    return Launch(
        name="random_words_fwd",
        kernel=random_words_fwd_kernel,
        grid=B * triton.cdiv(quads, config.block_q),
        constants={"BLOCK_Q": config.block_q},
        num_warps=config.num_warps,
        num_stages=1,
        bytes_moved=B * (8 + quads * 4 * 8),
        rows=B * quads * 4,
    )


def halves(seed: int) -> tuple[int, int]:
    """A 64-bit seed as two signed 32-bit numbers, low and high."""
    return tuple(((seed >> shift) + 2**31) % 2**32 - 2**31 for shift in (0, 32))


def _fake(numbers: Tensor, seed: int, stream: int, count: int) -> Tensor:
    return numbers.new_empty(numbers.shape[0], count)


@operator("random_words", _fake)
def random_words(numbers: Tensor, seed: int, stream: int, count: int) -> Tensor:
    """`words` for a seed that is a signed 64-bit number."""
    quads = (count + 3) // 4
    # rows of whole quads, so that every one begins at a multiple of 32 bytes
    out = numbers.new_empty(numbers.shape[0], 4 * quads)
    launch = plan(numbers.shape[0], quads, chosen("random_words", CONFIGS))
    launch.start(numbers, out, *halves(seed), stream, quads)
    return out if count == 4 * quads else out[:, :count].contiguous()


def words(seed: int, numbers: Tensor, stream: int, count: int) -> Tensor:
    """Random 32-bit words of each image.

    seed: the run's 64-bit seed. numbers: int64 [B], image numbers >= 0. stream: one of the names
    above. Returns int64 [B, count] with values in [0, 2^32). Raises ValueError for numbers of another type or shape.
    """
    if numbers.dtype != torch.int64 or numbers.ndim != 1:
        raise ValueError(f"numbers must be int64 [B], got {numbers.dtype} {list(numbers.shape)}")
    body = choose_body(numbers.device.type)[0]
    if body == "reference":
        return words_reference(seed, numbers, stream, count)
    return random_words(numbers.contiguous(), signed(seed), stream, count, body=body)


def signed(seed: int) -> int:
    """A 64-bit seed as an operator's integers are: the same bits, signed."""
    return (seed + 2**63) % 2**64 - 2**63


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
