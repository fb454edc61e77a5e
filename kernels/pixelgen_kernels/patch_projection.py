"""An image as patch tokens and as patch-major pixels; in training, noised on the way.

    z = t x + (1-t) s e        target = x - s e        x = image / 127.5 - 1,  e Philox noise of (seed, image number)
    pixels[b, l, p] = z[b, :, row, column]             l, p row-major over patches and over the pixels inside one
    tokens[b, l]    = W z_patch + bias                 with the features of a patch ordered (channel, row, column)

    dW = dtokens^T features,   dbias = sum dtokens     image, noise and pixels get no gradient

A first kernel draws each quad of Philox numbers once and writes z in both orders, patch-major pixels and features; the
projection reads the features. Backward reads them again, which is less work than drawing the noise again. dW is summed
over parts of the tokens, then over parts, in a fixed order. Path: arXiv 2511.20645
section 3; the convolution with kernel = stride = patch: ViT (arXiv 2010.11929) section 3.1. Shapes: image uint8
[B, H, W, 3] or float [B, 3, H, W]; features [B, L, 3 P]; tokens [B, L, D]; pixels [B, L, P, 3]; W [D, 3 P]; bias [D].
"""

# A kernel cannot unpack a tuple with a star: tuples grow by concatenation.
# ruff: noqa: RUF005

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from einops import rearrange
from torch import Tensor

from pixelgen_kernels import philox
from pixelgen_kernels.bodies import INTERPRETED, body
from pixelgen_kernels.checks import check
from pixelgen_kernels.launch import Launch
from pixelgen_kernels.registration import operator
from pixelgen_kernels.tuning import chosen


def patch_projection_reference(z_BCHW: Tensor, weight: Tensor, bias: Tensor, patch: int) -> tuple[Tensor, Tensor]:
    features = rearrange(z_BCHW, "B C (h p) (w q) -> B (h w) (C p q)", p=patch, q=patch)
    pixels = rearrange(features, "B L (C P) -> B L P C", C=z_BCHW.shape[1])
    return F.linear(features, weight, bias), pixels


def noised_patch_projection_reference(
    image: Tensor, numbers: Tensor, t: Tensor, weight: Tensor, bias: Tensor, patch: int, seed: int, noise_scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(weight.dtype, torch.float32)
    if image.dtype == torch.uint8:
        x_BCHW = rearrange(image.to(wide), "B H W C -> B C H W") / 127.5 - 1.0
    else:
        x_BCHW = image.to(wide)
    noise = philox.normal(seed, numbers, philox.NOISE, x_BCHW[:1].numel() if len(x_BCHW) else 0)
    e_BCHW = noise.to(wide).reshape(x_BCHW.shape)
    t = t.to(wide)[:, None, None, None]
    z_BCHW = t * x_BCHW + (1.0 - t) * noise_scale * e_BCHW
    target = rearrange(x_BCHW - noise_scale * e_BCHW, "B C (h p) (w q) -> B (h w) (p q) C", p=patch, q=patch)
    return *patch_projection_reference(z_BCHW.to(weight.dtype), weight, bias, patch), target


class Config(NamedTuple):
    """Noise: block_g groups of up to 16 columns, a group a thread. Projection: block_m tokens by block_n outputs.
    dW: block_d rows by block_k columns in `splits` parts of the tokens."""

    block_g: int
    noise_warps: int
    block_m: int
    block_n: int
    block_d: int
    block_k: int
    splits: int
    num_warps: int
    stages: int


CONFIGS = (
    Config(128, 4, 128, 128, 128, 128, 4, 8, 4),
    Config(64, 2, 128, 128, 128, 128, 4, 4, 4),
    Config(128, 4, 128, 128, 128, 128, 8, 8, 3),
)
STEP = 64  # depth of one step of both products
REDUCE_BLOCK, REDUCE_WARPS = 1024, 4
# minimax odd polynomial of sin(2 pi a) on |a| <= 1/4, error 2e-7 in float32
_S1 = tl.constexpr(6.2831853065)
_S3 = tl.constexpr(-41.341701930)
_S5 = tl.constexpr(81.605209431)
_S7 = tl.constexpr(-76.703667824)
_S9 = tl.constexpr(41.999989776)
_S11 = tl.constexpr(-14.337024388)


@triton.jit
def _sine(a):
    """sin(2 pi a) for |a| <= 1/4; libdevice's takes a stack for its large arguments."""
    s = a * a
    return a * (((((_S11 * s + _S9) * s + _S7) * s + _S5) * s + _S3) * s + _S1)


@triton.jit
def _box_muller(first, second):
    """Two normal numbers from two words, as philox.normal: radius from the first, angle 2 pi u from the second."""
    u = ((first >> 9).to(tl.float32) + 0.5) * (2.0**-23)
    q = ((second >> 9).to(tl.float32) + 0.5) * (2.0**-23) - 0.5
    radius = tl.sqrt(-2.0 * tl.log(u))
    c = tl.abs(q) - 0.25
    sine = _sine(0.25 - tl.abs(c))
    return radius * _sine(c), radius * tl.where(q < 0.0, sine, -sine)


@triton.jit
def _columns(x, LEVELS: tl.constexpr):
    """The 2^LEVELS columns of [G, 2^LEVELS] as a tuple of [G, 1]."""
    G: tl.constexpr = x.shape[0]
    parts = (x,)
    for level in tl.static_range(LEVELS):
        even = ()
        odd = ()
        for i in tl.static_range(2**level):
            a, b = tl.split(tl.reshape(parts[i], [G, 2 ** (LEVELS - level - 1), 2]))
            even = even + (a,)
            odd = odd + (b,)
        parts = even + odd
    return parts


@triton.jit
def _merge(parts, FIRST: tl.constexpr, LEVELS: tl.constexpr):
    """2^LEVELS columns of a tuple, from FIRST on, as [G, 2^LEVELS]."""
    merged = ()
    for i in tl.static_range(2**LEVELS):
        merged = merged + (parts[FIRST + i],)
    for level in tl.static_range(LEVELS):
        wider = ()
        for i in tl.static_range(2 ** (LEVELS - level - 1)):
            wider = wider + (tl.interleave(merged[i], merged[i + 2 ** (LEVELS - level - 1)]),)
        merged = wider
    return merged[0]


@triton.jit(do_not_specialize=["seed_low", "seed_high"])
def noised_patch_projection_noise_fwd_kernel(
    image_ptr, numbers_ptr, t_ptr, features_ptr, pixels_ptr, target_ptr, seed_low, seed_high, noise_scale,
    H: tl.constexpr, W: tl.constexpr, PATCH: tl.constexpr, LEVELS: tl.constexpr, BLOCK_G: tl.constexpr,
    PLANAR: tl.constexpr,
):  # fmt: skip
    """A thread takes GROUP neighbouring columns of a patch row with their three channels and reorders them by name."""
    GROUP: tl.constexpr = 2**LEVELS
    groups: tl.constexpr = H * W // GROUP
    blocks: tl.constexpr = (groups + BLOCK_G - 1) // BLOCK_G
    P: tl.constexpr = PATCH * PATCH
    image = (tl.program_id(0) // blocks).to(tl.int64)
    g = (tl.program_id(0) % blocks) * BLOCK_G + tl.arange(0, BLOCK_G)[:, None]
    o = tl.arange(0, GROUP)[None, :]
    mask = g < groups
    base = image * (3 * H * W)
    row = g // (W // GROUP)
    patch = row // PATCH * (W // PATCH) + g % (W // GROUP) // (PATCH // GROUP)
    pixel = row % PATCH * PATCH + g % (PATCH // GROUP) * GROUP
    number = tl.load(numbers_ptr + image)
    low, high = (number & 0xFFFFFFFF).to(tl.uint32), (number >> 32).to(tl.uint32)
    t = tl.load(t_ptr + image).to(tl.float32)
    keep = (1.0 - t) * noise_scale
    seed = philox.key_of(seed_low, seed_high)

    # x, e: 3 GROUP columns, channel-major: channel c of pixel i at c GROUP + i
    x = ()
    e = ()
    for c in tl.static_range(3):
        if PLANAR:
            plane = tl.load(image_ptr + base + c * H * W + g * GROUP + o, mask=mask, other=0.0)
            x = x + _columns(plane.to(tl.float32), LEVELS)
        for quad in tl.static_range(GROUP // 4):
            counter = (c * (H * W // 4) + g * (GROUP // 4) + quad).to(tl.uint32)
            zero = counter * 0
            w0, w1, w2, w3 = tl.philox(seed, counter, zero + low, zero + high, zero)
            e0, e1 = _box_muller(w0, w1)
            e2, e3 = _box_muller(w2, w3)
            e = e + (e0, e1, e2, e3)
    if not PLANAR:
        raw = ()
        for c in tl.static_range(3):
            chunk = tl.load(image_ptr + base + g * (3 * GROUP) + c * GROUP + o, mask=mask, other=0)
            raw = raw + _columns(chunk, LEVELS)
        for i in tl.static_range(3 * GROUP):
            x = x + (raw[i % GROUP * 3 + i // GROUP].to(tl.float32) * (1.0 / 127.5) - 1.0,)

    z = ()
    v = ()
    for i in tl.static_range(3 * GROUP):
        z = z + ((t * x[i] + keep * e[i]).to(features_ptr.dtype.element_ty),)
    for i in tl.static_range(3 * GROUP):
        v = v + (x[i % 3 * GROUP + i // 3] - noise_scale * e[i % 3 * GROUP + i // 3],)
    z_pixels = ()
    for i in tl.static_range(3 * GROUP):
        z_pixels = z_pixels + (z[i % 3 * GROUP + i // 3],)
    for c in tl.static_range(3):
        slot = base + patch * (3 * P) + pixel * 3 + c * GROUP + o
        tl.store(features_ptr + base + patch * (3 * P) + c * P + pixel + o, _merge(z, c * GROUP, LEVELS), mask=mask)
        tl.store(pixels_ptr + slot, _merge(z_pixels, c * GROUP, LEVELS), mask=mask)
        tl.store(target_ptr + slot, _merge(v, c * GROUP, LEVELS), mask=mask)


@triton.jit
def noised_patch_projection_fwd_kernel(
    features_ptr, weight_ptr, bias_ptr, tokens_ptr, M, D: tl.constexpr, K: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    blocks: tl.constexpr = (D + BLOCK_N - 1) // BLOCK_N
    first = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_M
    features_ptr += first * K
    tokens_ptr += first * D
    o_m = tl.arange(0, BLOCK_M)[:, None]
    o_n = (tl.program_id(0) % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K)
    m_m, m_n = o_m < M - first, o_n < D
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, K, BLOCK_K):
        m_k = o_k < K - k
        z = tl.load(features_ptr + o_m * K + k + o_k[None, :], mask=m_m & m_k[None, :], other=0.0)
        w = tl.load(weight_ptr + o_n[:, None] * K + k + o_k[None, :], mask=m_n[:, None] & m_k[None, :], other=0.0)
        acc = tl.dot(z.to(DTYPE), tl.trans(w.to(DTYPE)), acc, input_precision="ieee")
    acc += tl.load(bias_ptr + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    tl.store(tokens_ptr + o_m * D + o_n[None, :], acc.to(tokens_ptr.dtype.element_ty), mask=m_m & m_n[None, :])


@triton.jit
def noised_patch_projection_bwd_kernel(
    dtokens_ptr, features_ptr, partial_ptr, M, rows, D: tl.constexpr, K: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """partial [splits, D K + D]: dW | dbias of `rows` tokens each."""
    across: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    tiles: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D * across
    split = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    first = split.to(tl.int64) * rows
    dtokens_ptr += first * D
    features_ptr += first * K
    o_d = tile // across * BLOCK_D + tl.arange(0, BLOCK_D)
    o_k = tile % across * BLOCK_K + tl.arange(0, BLOCK_K)
    o_m = tl.arange(0, BLOCK_M)[:, None]
    m_d, m_k = o_d < D, o_k < K
    ones = tl.full([BLOCK_M, 8], 1.0, DTYPE)
    dw = tl.zeros([BLOCK_D, BLOCK_K], tl.float32)
    db = tl.zeros([BLOCK_D, 8], tl.float32)
    here = tl.minimum(rows, M - first)
    for m in range(0, here, BLOCK_M):
        m_m = o_m < here - m
        row = m + o_m
        dtokens = tl.load(dtokens_ptr + row * D + o_d[None, :], mask=m_m & m_d[None, :], other=0.0)
        z = tl.load(features_ptr + row * K + o_k[None, :], mask=m_m & m_k[None, :], other=0.0)
        transposed = tl.trans(dtokens.to(DTYPE))
        dw = tl.dot(transposed, z.to(DTYPE), dw, input_precision="ieee")
        db = tl.dot(transposed, ones, db, input_precision="ieee")
    partial_ptr += split.to(tl.int64) * (D * K + D)
    tl.store(partial_ptr + o_d[:, None] * K + o_k[None, :], dw, mask=m_d[:, None] & m_k[None, :])
    if tile % across == 0:
        tl.store(partial_ptr + D * K + o_d, tl.sum(db, axis=1) * 0.125, mask=m_d)


@triton.jit
def noised_patch_projection_bwd_reduce_kernel(partial_ptr, out_ptr, N, splits, BLOCK: tl.constexpr):
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for split in range(splits):
        total += tl.load(partial_ptr + split * N.to(tl.int64) + o, mask=o < N, other=0.0)
    tl.store(out_ptr + o, total.to(out_ptr.dtype.element_ty), mask=o < N)


def _operand(dtype: torch.dtype) -> Any:
    """Type of the operands of the products: float32 in the interpreter, whose products are right in it only."""
    kinds = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
    return tl.float32 if INTERPRETED else kinds.get(dtype, tl.float32)


def _group(patch: int) -> int:
    """Columns that a thread takes: 16 where they lie in one row of a patch, else 8 or 4."""
    return next(n for n in (16, 8, 4) if patch % n == 0)


def _sizes(image: Tensor) -> tuple[int, int, int]:
    """(B, H, W)."""
    return image.shape[0], *(image.shape[1:3] if image.dtype == torch.uint8 else image.shape[2:])


def _splits(tokens: int, config: Config) -> tuple[int, int]:
    """(parts of the tokens, tokens of a part), a part a multiple of STEP."""
    rows = triton.cdiv(max(triton.cdiv(tokens, config.splits), 1), STEP) * STEP
    return triton.cdiv(tokens, rows), rows


@functools.cache
def plan_forward(
    B: int, H: int, W: int, patch: int, planar: bool, image_bytes: int, D: int, dtype: torch.dtype, config: Config
) -> tuple[Launch, Launch]:
    """(noise, projection). planar: a float image. image_bytes: of one number of it. dtype: of the weight."""
    M, K, pixels, group, size = B * (H * W // patch**2), 3 * patch**2, B * H * W, _group(patch), dtype.itemsize
    noise = Launch(
        name="noised_patch_projection_noise_fwd",
        kernel=noised_patch_projection_noise_fwd_kernel,
        grid=B * triton.cdiv(H * W // group, config.block_g),
        constants={
            "H": H, "W": W, "PATCH": patch, "LEVELS": group.bit_length() - 1, "BLOCK_G": config.block_g,
            "PLANAR": planar,
        },
        num_warps=config.noise_warps,
        num_stages=1,
        bytes_moved=pixels * 3 * (image_bytes + 2 * size + 4),
        rows=pixels,
    )  # fmt: skip
    projection = Launch(
        name="noised_patch_projection_fwd",
        kernel=noised_patch_projection_fwd_kernel,
        grid=triton.cdiv(M, config.block_m) * triton.cdiv(D, config.block_n),
        constants={
            "D": D, "K": K, "DTYPE": _operand(dtype), "BLOCK_M": config.block_m, "BLOCK_N": config.block_n,
            "BLOCK_K": STEP,
        },
        num_warps=config.num_warps,
        num_stages=config.stages,
        flops=2 * M * D * K,
        bytes_moved=size * (M * K + D * K + M * D + D),
        rows=M,
        loops=(triton.cdiv(K, STEP),),
    )  # fmt: skip
    return noise, projection


@functools.cache
def plan_backward(M: int, D: int, K: int, dtype: torch.dtype, config: Config) -> tuple[int, int, Launch, Launch]:
    """(parts of the tokens, tokens of a part, the products of the parts, their sum). dtype: of the weight."""
    splits, rows = _splits(M, config)
    packed = D * K + D
    products = Launch(
        name="noised_patch_projection_bwd",
        kernel=noised_patch_projection_bwd_kernel,
        grid=splits * triton.cdiv(D, config.block_d) * triton.cdiv(K, config.block_k),
        constants={
            "D": D, "K": K, "DTYPE": _operand(dtype), "BLOCK_D": config.block_d, "BLOCK_K": config.block_k,
            "BLOCK_M": STEP,
        },
        num_warps=config.num_warps,
        num_stages=config.stages,
        flops=2 * M * D * K,
        bytes_moved=dtype.itemsize * M * (K + D) + 4 * splits * packed,
        rows=M,
        loops=(rows // STEP,),
    )  # fmt: skip
    reduction = Launch(
        name="noised_patch_projection_bwd_reduce",
        kernel=noised_patch_projection_bwd_reduce_kernel,
        grid=triton.cdiv(packed, REDUCE_BLOCK),
        constants={"BLOCK": REDUCE_BLOCK},
        num_warps=REDUCE_WARPS,
        num_stages=1,
        bytes_moved=(4 * splits + dtype.itemsize) * packed,
        rows=max(M, 1),
        loops=(splits,),
    )
    return splits, rows, products, reduction


def _fake_forward(
    image: Tensor, numbers: Tensor, t: Tensor, weight: Tensor, bias: Tensor, patch: int, seed: int, noise_scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (B, H, W), P = _sizes(image), patch * patch
    L = H * W // P
    return (
        weight.new_empty(B, L, weight.shape[0]),
        weight.new_empty(B, L, P, 3),
        weight.new_empty(B, L, P, 3, dtype=torch.float32),
        weight.new_empty(B, L, 3 * P),
    )


def _fake_backward(dtokens: Tensor, features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    dtype = weight.dtype if weight.dtype == bias.dtype else torch.float32
    return weight.new_empty(weight.numel() + bias.numel(), dtype=dtype)


def _flops_forward(
    image: torch.Size, numbers: torch.Size, t: torch.Size, weight: torch.Size, *_: Any, out_shape: Any, **__: Any
) -> int:
    B, L, D = out_shape[0]
    return 2 * B * L * D * weight[1]


def _flops_backward(dtokens: torch.Size, features: torch.Size, weight: torch.Size, *_: Any, **__: Any) -> int:
    return 2 * dtokens[0] * dtokens[1] * weight[0] * weight[1]


@operator("noised_patch_projection", _fake_forward, _flops_forward)
def noised_patch_projection_forward(
    image: Tensor, numbers: Tensor, t: Tensor, weight: Tensor, bias: Tensor, patch: int, seed: int, noise_scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(tokens, pixels, target, features)."""
    outputs = _fake_forward(image, numbers, t, weight, bias, patch, seed, noise_scale)
    tokens, pixels, target, features = outputs
    (B, H, W), (D, K) = _sizes(image), weight.shape
    config = chosen("noised_patch_projection", CONFIGS, D, K)
    planar = image.dtype != torch.uint8
    noise, projection = plan_forward(B, H, W, patch, planar, image.element_size(), D, weight.dtype, config)
    noise.start(image, numbers, t, features, pixels, target, *philox.halves(seed), noise_scale)
    projection.start(features, weight, bias, tokens, tokens.shape[0] * tokens.shape[1])
    return outputs


@operator("noised_patch_projection_backward", _fake_backward, _flops_backward)
def noised_patch_projection_backward(dtokens: Tensor, features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """dW | dbias in one tensor [D K + D]."""
    (D, K), M = weight.shape, features.shape[0] * features.shape[1]
    config = chosen("noised_patch_projection", CONFIGS, D, K)
    splits, rows, products, reduction = plan_backward(M, D, K, weight.dtype, config)
    partial = features.new_empty((splits, D * K + D), dtype=torch.float32)
    packed = _fake_backward(dtokens, features, weight, bias)
    products.start(dtokens, features, partial, M, rows)
    reduction.start(partial, packed, D * K + D, splits)
    return packed


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(output[3], *inputs[3:5])
    # pixels and target carry no gradient, and an absent one must not cost a tensor of zeros
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dtokens: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if dtokens is None:
        return (None,) * 8
    features, weight, bias = ctx.saved_tensors
    packed = noised_patch_projection_backward(dtokens.contiguous(), features, weight, bias)
    dweight, dbias = packed.split([weight.numel(), bias.numel()])
    return None, None, None, dweight.view_as(weight).to(weight.dtype), dbias.to(bias.dtype), None, None, None


noised_patch_projection_forward.gradient(_save, _backward)


def patch_projection(z_BCHW: Tensor, weight: Tensor, bias: Tensor, patch: int) -> tuple[Tensor, Tensor]:
    """Return (tokens [B, L, D], pixels [B, L, P, 3]).

    Raises ValueError when the image does not divide into patches or the weight does not fit.
    """
    _, C, H, W = z_BCHW.shape
    if H % patch or W % patch:
        raise ValueError(f"patch_projection: image {H} x {W} does not divide into {patch} x {patch} patches")
    if weight.shape[1] != C * patch * patch or bias.shape != weight.shape[:1]:
        raise ValueError(
            f"patch_projection: {C} channels and patch {patch} need weight [D, {C * patch * patch}] and bias [D], "
            f"got {list(weight.shape)}, {list(bias.shape)}"
        )
    return patch_projection_reference(z_BCHW, weight, bias, patch)


def noised_patch_projection(
    image: Tensor,
    numbers: Tensor,
    t: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    patch: int,
    seed: int,
    noise_scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (tokens [B, L, D], z pixels [B, L, P, 3], target [B, L, P, 3]); the first two in weight's dtype, the
    target x - s e in float32.

    image: uint8 [B, H, W, 3], or float [B, 3, H, W] in [-1, 1]. numbers: int64 [B], image numbers. t: [B] in [0, 1],
    0 is noise. weight, bias: the projection; only they get a gradient. patch: a multiple of 4, because a quad of Philox
    numbers covers four columns. seed: the run's 64-bit seed. Raises ValueError naming what does not fit.
    """
    op, planar = "noised_patch_projection", image.dtype != torch.uint8
    if image.ndim != 4 or image.shape[1 if planar else 3] != 3:
        wanted = "float [B, 3, H, W] or uint8 [B, H, W, 3]"
        raise ValueError(f"{op}: image must be {wanted}, got {image.dtype} {list(image.shape)}")
    B, H, W = _sizes(image)
    if patch < 4 or patch % 4:
        raise ValueError(f"{op}: patch must be a multiple of 4, got {patch}")
    if H % patch or W % patch:
        raise ValueError(f"{op}: image {H} x {W} does not divide into {patch} x {patch} patches")
    if numbers.dtype != torch.int64 or numbers.shape != (B,) or numbers.device != weight.device:
        got = f"{numbers.dtype} {list(numbers.shape)} on {numbers.device}"
        raise ValueError(f"{op}: numbers must be int64 [{B}] on {weight.device}, got {got}")
    if not planar and (image.device != weight.device or not image.is_contiguous()):
        raise ValueError(f"{op}: image must be contiguous on {weight.device}; call .contiguous() or .to() first")
    D = weight.shape[0]
    floats = {"weight": (weight, (D, 3 * patch * patch)), "bias": (bias, (D,)), "t": (t, (B,))}
    check(op, weight, **floats, **({"image": (image, image.shape)} if planar else {}))
    for name, constant in (("image", image), ("t", t)):
        if constant.requires_grad:
            raise ValueError(f"{op}: {name} gets no gradient, but requires one; pass {name}.detach()")
    arguments = (image, numbers, t, weight, bias, patch, philox.signed(seed), noise_scale)
    chosen_body = body(weight)
    if chosen_body == "reference":
        return noised_patch_projection_reference(*arguments)
    tokens, pixels, target, _ = noised_patch_projection_forward.apply(*arguments, body=chosen_body)
    return tokens, pixels.detach(), target.detach()
