"""The per-pixel half of a pixel block: residual of the attention branch, norm, modulation, MLP, residual.

    gated   m = x + gate1 * e                       modulation = (gate1 | shift2 | scale2 | gate2)
            y = m + gate2 * MLP(n * norm_weight * (1 + scale2) + shift2)
    post    m = x + (1 + scale1) * e + shift1       modulation = (scale1 | shift1 | scale2 | shift2)
            y = m + (1 + scale2) * MLP(n * norm_weight) + shift2
    n = m r,  r = 1 / sqrt(mean_C(m^2) + eps)       MLP(h) = W2 gelu(u) + b2,  u = W1 h + b1

    do = dy * gate2,  du = (do W2) * gelu'(u),  dh = du W1,  dW2 = sum do^T gelu(u),  dW1 = sum du^T h
    dn = dh * norm_weight * (1 + scale2),   dm = dy + r (dn - n mean_C(dn n)) = dx,   de = dm * gate1,   dgate1 = dm * e
    dscale2 = dh * n * norm_weight,  dshift2 = dh,  dgate2 = dy * MLP(h)            (gated; post likewise)

PixelDiT (arXiv 2511.20645): gated is the paper's block, post its stable variant. Statistics and sums are float32, the
products take operands of the weights' type. Backward keeps the inputs, recomputes the hidden layer in registers, and
writes the modulation's gradient packed as it came. Programs stay on their SM, prefetch the next block of pixels and
keep their weight gradients until the end; one reduction in a fixed order adds them.

In the backward kernel, loads go to shared memory ahead of time, all at once; x is widened by a product with the
identity, which puts it, and all that follows, in the layout of the matrix products; biases and the gradient of b1 are
products with a block of ones, so that sums over pixels stay within a thread; e, gate and scale are read again (from L2)
after the MLP instead of held across it. What each of these gave, and what lost: benchmarks/results/kernels_tried.md.

Shapes: x, e, y [N, P, C]; modulation [N, P, 4 C]; norm weight [C]; W1 [F, C]; b1 [F]; W2 [C, F]; b2 [C]; M = N P.
"""

from __future__ import annotations

import functools
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from pixelgen_kernels.bodies import body
from pixelgen_kernels.checks import check
from pixelgen_kernels.gelu import gelu as gelu_of
from pixelgen_kernels.gelu import gelu_and_derivative
from pixelgen_kernels.launch import Launch, multiprocessors
from pixelgen_kernels.registration import operator
from pixelgen_kernels.sum_partials import plan_sum, sum_partials
from pixelgen_kernels.tuning import chosen

Gelu = Literal["none", "tanh"]


def pixel_mlp_reference(
    x_NPC: Tensor,
    e_NPC: Tensor,
    modulation: Tensor,
    norm_weight_C: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    post: bool,
    gelu: Gelu,
    eps: float,
) -> Tensor:
    wide = torch.promote_types(x_NPC.dtype, torch.float32)

    def mlp(h: Tensor) -> Tensor:
        return F.linear(F.gelu(F.linear(h.to(w1.dtype), w1, b1), approximate=gelu), w2, b2)

    def norm(m: Tensor) -> Tensor:
        return F.rms_norm(m, norm_weight_C.shape, norm_weight_C.to(wide), eps)

    if post:
        scale1, shift1, scale2, shift2 = modulation.to(wide).chunk(4, dim=-1)
        m_NPC = x_NPC.to(wide) + (1.0 + scale1) * e_NPC + shift1
        y_NPC = m_NPC + (1.0 + scale2) * mlp(norm(m_NPC)) + shift2
    else:
        gate1, shift2, scale2, gate2 = modulation.to(wide).chunk(4, dim=-1)
        m_NPC = x_NPC.to(wide) + gate1 * e_NPC
        y_NPC = m_NPC + gate2 * mlp(norm(m_NPC) * (1.0 + scale2) + shift2)
    return y_NPC.to(x_NPC.dtype)


class Config(NamedTuple):
    """A program handles block_m pixels at a time and prefetches stages - 1 blocks of them.

    programs_fwd, programs_bwd: programs of a kernel on each multiprocessor.
    """

    block_m: int
    num_warps: int
    stages: int
    programs_fwd: int
    programs_bwd: int


CONFIGS = (
    Config(64, 4, 2, 5, 2),
    Config(64, 4, 3, 5, 2),
    Config(64, 4, 2, 4, 2),
    Config(64, 4, 3, 4, 2),
    Config(128, 8, 2, 2, 1),
    Config(128, 8, 3, 2, 1),
)


@triton.jit
def _dot(a, b, acc, DTYPE: tl.constexpr):
    """a b + acc (None: 0) in float32, on operands of type DTYPE."""
    return tl.dot(a.to(DTYPE), b.to(DTYPE), acc, input_precision="ieee")


@triton.jit
def _load_weights(
    norm_weight_ptr, w1_ptr, b1_ptr, w2_ptr, b2_ptr,
    C: tl.constexpr, F: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """norm_weight [1, C], W1 [F, C], W2 [C, F], and the biases as [16, F] and [16, C], zeros below the first row."""
    o_c, o_f, o_k = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_F), tl.arange(0, 16)[:, None]
    m_c, m_f = o_c < C, o_f < F
    norm_weight = tl.load(norm_weight_ptr + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    w1 = tl.load(w1_ptr + o_f[:, None] * C + o_c[None, :], mask=m_f[:, None] & m_c[None, :], other=0.0)
    w2 = tl.load(w2_ptr + o_c[:, None] * F + o_f[None, :], mask=m_c[:, None] & m_f[None, :], other=0.0)
    b1 = tl.load(b1_ptr + o_k * F + o_f[None, :], mask=(o_k == 0) & m_f[None, :], other=0.0)
    b2 = tl.load(b2_ptr + o_k * C + o_c[None, :], mask=(o_k == 0) & m_c[None, :], other=0.0)
    return norm_weight, w1, b1, w2, b2


@triton.jit
def _load(ptr, offset, mask, EVEN: tl.constexpr):
    if EVEN:
        return tl.load(ptr + offset)
    return tl.load(ptr + offset, mask=mask, other=0.0)


@triton.jit
def _store(ptr, offset, value, mask, EVEN: tl.constexpr):
    if EVEN:
        tl.store(ptr + offset, value.to(ptr.dtype.element_ty))
    else:
        tl.store(ptr + offset, value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _column_sums(acc, x, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """acc [BLOCK_M / 16, 8, BLOCK_C] + sums of x over pairs of rows: those that one thread holds, so no exchange."""
    return acc + tl.sum(tl.reshape(x, [BLOCK_M // 16, 2, 8, BLOCK_C]), axis=1)


@triton.jit
def pixel_mlp_fwd_kernel(
    x_ptr, e_ptr, mod_ptr, norm_weight_ptr, w1_ptr, b1_ptr, w2_ptr, b2_ptr, y_ptr, M, blocks, eps,
    C: tl.constexpr, F: tl.constexpr, POST: tl.constexpr, TANH: tl.constexpr, EVEN: tl.constexpr,
    DTYPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_F: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    norm_weight, w1, b1, w2, b2 = _load_weights(norm_weight_ptr, w1_ptr, b1_ptr, w2_ptr, b2_ptr, C, F, BLOCK_C, BLOCK_F)
    o_m = tl.arange(0, BLOCK_M)[:, None]
    o_c = tl.arange(0, BLOCK_C)[None, :]
    row, slots = o_m * C + o_c, o_m * (4 * C) + o_c
    ones = tl.full([BLOCK_M, 16], 1.0, tl.float32)
    identity = tl.where(tl.arange(0, BLOCK_C)[:, None] == o_c, 1.0, 0.0)

    tl.assume(tl.program_id(0) < blocks)
    for block in tl.range(tl.program_id(0), blocks, tl.num_programs(0), num_stages=STAGES):
        first = tl.cast(block, tl.int64) * BLOCK_M
        mask = (o_m < M - first) & (o_c < C)
        x_block = _load(x_ptr + first * C, row, mask, EVEN)
        x = _dot(x_block, identity, None, x_block.dtype)
        e = _load(e_ptr + first * C, row, mask, EVEN).to(tl.float32)
        mod = mod_ptr + first * (4 * C)
        if POST:
            scale1 = _load(mod, slots, mask, EVEN).to(tl.float32)
            shift1 = _load(mod, slots + C, mask, EVEN).to(tl.float32)
            scale2 = _load(mod, slots + 2 * C, mask, EVEN).to(tl.float32)
            shift2 = _load(mod, slots + 3 * C, mask, EVEN).to(tl.float32)
            m = x + (1.0 + scale1) * e + shift1
        else:
            gate1 = _load(mod, slots, mask, EVEN).to(tl.float32)
            shift2 = _load(mod, slots + C, mask, EVEN).to(tl.float32)
            scale2 = _load(mod, slots + 2 * C, mask, EVEN).to(tl.float32)
            gate2 = _load(mod, slots + 3 * C, mask, EVEN).to(tl.float32)
            m = x + gate1 * e
        h = m * tl.rsqrt(tl.sum(m * m, axis=1) / C + eps)[:, None] * norm_weight
        if not POST:
            h = h * (1.0 + scale2) + shift2
        u = _dot(h, tl.trans(w1), _dot(ones, b1, None, DTYPE), DTYPE)
        o = _dot(gelu_of(u, TANH), tl.trans(w2), _dot(ones, b2, None, DTYPE), DTYPE)
        y = m + (1.0 + scale2) * o + shift2 if POST else m + gate2 * o
        _store(y_ptr + first * C, row, y, mask, EVEN)


@triton.jit
def pixel_mlp_bwd_kernel(
    dy_ptr, x_ptr, e_ptr, mod_ptr, norm_weight_ptr, w1_ptr, b1_ptr, w2_ptr, b2_ptr, dx_ptr, de_ptr, dmod_ptr,
    partial_ptr, M, blocks, eps,
    C: tl.constexpr, F: tl.constexpr, POST: tl.constexpr, TANH: tl.constexpr, EVEN: tl.constexpr,
    DTYPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_F: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    norm_weight, w1, b1, w2, b2 = _load_weights(norm_weight_ptr, w1_ptr, b1_ptr, w2_ptr, b2_ptr, C, F, BLOCK_C, BLOCK_F)
    o_m = tl.arange(0, BLOCK_M)[:, None]
    o_c = tl.arange(0, BLOCK_C)[None, :]
    row, slots = o_m * C + o_c, o_m * (4 * C) + o_c
    ones = tl.full([BLOCK_M, 16], 1.0, tl.float32)
    identity = tl.where(tl.arange(0, BLOCK_C)[:, None] == o_c, 1.0, 0.0)
    dw1 = tl.zeros([BLOCK_F, BLOCK_C], tl.float32)
    db1 = tl.zeros([BLOCK_F, 16], tl.float32)
    dw2 = tl.zeros([BLOCK_F, BLOCK_C], tl.float32)
    db2 = tl.zeros([BLOCK_M // 16, 8, BLOCK_C], tl.float32)
    dnorm_weight = tl.zeros([BLOCK_M // 16, 8, BLOCK_C], tl.float32)

    tl.assume(tl.program_id(0) < blocks)
    for block in tl.range(tl.program_id(0), blocks, tl.num_programs(0), num_stages=STAGES):
        first = tl.cast(block, tl.int64) * BLOCK_M
        mask = (o_m < M - first) & (o_c < C)
        x_block = _load(x_ptr + first * C, row, mask, EVEN)
        x = _dot(x_block, identity, None, x_block.dtype)
        e = _load(e_ptr + first * C, row, mask, EVEN).to(tl.float32)
        dy = _load(dy_ptr + first * C, row, mask, EVEN).to(tl.float32)
        mod, dmod = mod_ptr + first * (4 * C), dmod_ptr + first * (4 * C)
        if POST:
            scale1 = _load(mod, slots, mask, EVEN).to(tl.float32)
            shift1 = _load(mod, slots + C, mask, EVEN).to(tl.float32)
            factor = 1.0 + _load(mod, slots + 2 * C, mask, EVEN).to(tl.float32)
            m = x + (1.0 + scale1) * e + shift1
            do = dy * factor
            _store(dmod, slots + 3 * C, dy, mask, EVEN)
        else:
            gate1 = _load(mod, slots, mask, EVEN).to(tl.float32)
            shift2 = _load(mod, slots + C, mask, EVEN).to(tl.float32)
            factor = 1.0 + _load(mod, slots + 2 * C, mask, EVEN).to(tl.float32)
            m = x + gate1 * e
            do = dy * _load(mod, slots + 3 * C, mask, EVEN).to(tl.float32)
        r = tl.rsqrt(tl.sum(m * m, axis=1) / C + eps)[:, None]
        n = m * r
        h = (n * norm_weight if POST else n * factor * norm_weight + shift2).to(DTYPE)
        db2 = _column_sums(db2, do, BLOCK_M, BLOCK_C)
        do = do.to(DTYPE)

        u = _dot(h, tl.trans(w1), _dot(ones, b1, None, DTYPE), DTYPE)
        g, slope = gelu_and_derivative(u, TANH)
        g = g.to(DTYPE)
        o = _dot(g, tl.trans(w2), _dot(ones, b2, None, DTYPE), DTYPE)
        dw2 = _dot(tl.trans(g), do, dw2, DTYPE)
        if POST:
            _store(dmod, slots + 2 * C, dy * o, mask, EVEN)
        else:
            _store(dmod, slots + 3 * C, dy * o, mask, EVEN)
        du = (_dot(do, w2, None, DTYPE) * slope).to(DTYPE)
        dh = _dot(du, w1, None, DTYPE)
        dw1 = _dot(tl.trans(du), h, dw1, DTYPE)
        db1 = _dot(tl.trans(du), ones, db1, DTYPE)

        # Loads of their own, which the stores above keep the compiler from merging with the first ones.
        e = _load(e_ptr + first * C, row, mask, EVEN).to(tl.float32)
        gate = _load(mod, slots, mask, EVEN).to(tl.float32)
        dhn = dh * n
        if POST:
            gate += 1.0
        else:
            factor = 1.0 + _load(mod, slots + 2 * C, mask, EVEN).to(tl.float32)
            _store(dmod, slots + C, dh, mask, EVEN)
            _store(dmod, slots + 2 * C, dhn * norm_weight, mask, EVEN)
            dh *= factor
            dhn *= factor
        dnorm_weight = _column_sums(dnorm_weight, dhn, BLOCK_M, BLOCK_C)
        dn = dh * norm_weight
        dm = dy + r * (dn - n * (tl.sum(dn * n, axis=1) / C)[:, None])
        _store(dx_ptr + first * C, row, dm, mask, EVEN)
        _store(de_ptr + first * C, row, dm * gate, mask, EVEN)
        _store(dmod, slots, dm * e, mask, EVEN)
        if POST:
            _store(dmod, slots + C, dm, mask, EVEN)

    # partial: dW1 [F, C], dW2^T [F, C], db1 [F], db2 [C], dnorm_weight [C]
    partial_ptr += tl.program_id(0) * (2 * F * C + F + 2 * C)
    o_f, o_c = tl.arange(0, BLOCK_F), tl.arange(0, BLOCK_C)
    weights, mask = o_f[:, None] * C + o_c[None, :], (o_f[:, None] < F) & (o_c[None, :] < C)
    tl.store(partial_ptr + weights, dw1, mask=mask)
    tl.store(partial_ptr + F * C + weights, dw2, mask=mask)
    partial_ptr += 2 * F * C
    tl.store(partial_ptr + o_f, tl.sum(db1, axis=1) / 16, mask=o_f < F)
    tl.store(partial_ptr + F + o_c, tl.sum(tl.sum(db2, axis=0), axis=0), mask=o_c < C)
    tl.store(partial_ptr + F + C + o_c, tl.sum(tl.sum(dnorm_weight, axis=0), axis=0), mask=o_c < C)


TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def _constants(
    M: int, C: int, hidden: int, post: bool, gelu: str, dtype: torch.dtype, config: Config
) -> dict[str, Any]:
    # Tensor cores multiply 16 by 16 at least; the padding is zero and stays zero.
    block_c = max(16, triton.next_power_of_2(C))
    return {
        "C": C,
        "F": hidden,
        "POST": post,
        "TANH": gelu == "tanh",
        "EVEN": M % config.block_m == 0 and block_c == C,
        "DTYPE": TYPES[dtype],
        "BLOCK_M": config.block_m,
        "BLOCK_C": block_c,
        "BLOCK_F": max(16, triton.next_power_of_2(hidden)),
        "STAGES": config.stages,
    }


@functools.cache
def plan_forward(
    M: int, C: int, hidden: int, post: bool, gelu: str, dtype: torch.dtype, itemsize: int, config: Config,
    multiprocessors: int,
) -> tuple[int, Launch]:  # fmt: skip
    """(blocks of pixels, launch). dtype: of the products' operands."""
    blocks = triton.cdiv(M, config.block_m)
    grid = min(blocks, config.programs_fwd * multiprocessors)
    return blocks, Launch(
        name="pixel_mlp_fwd",
        kernel=pixel_mlp_fwd_kernel,
        grid=grid,
        constants=_constants(M, C, hidden, post, gelu, dtype, config),
        num_warps=config.num_warps,
        num_stages=3,
        flops=2 * 2 * M * C * hidden,
        bytes_moved=7 * M * C * itemsize,
        rows=M,
        loops=(triton.cdiv(blocks, max(grid, 1)),),
    )


@functools.cache
def plan_backward(
    M: int, C: int, hidden: int, post: bool, gelu: str, dtype: torch.dtype, itemsize: int, config: Config,
    multiprocessors: int,
) -> tuple[int, Launch, Launch]:  # fmt: skip
    """(blocks of pixels, the pass over pixels, the reduction of its partial sums). FLOPs count the recomputation."""
    blocks = triton.cdiv(M, config.block_m)
    programs = min(blocks, config.programs_bwd * multiprocessors)
    pixels = Launch(
        name="pixel_mlp_bwd",
        kernel=pixel_mlp_bwd_kernel,
        grid=programs,
        constants=_constants(M, C, hidden, post, gelu, dtype, config),
        num_warps=config.num_warps,
        num_stages=3,
        flops=6 * 2 * M * C * hidden,
        bytes_moved=(12 if post else 13) * M * C * itemsize,
        rows=M,
        loops=(triton.cdiv(blocks, max(programs, 1)),),
    )
    return blocks, pixels, plan_sum("pixel_mlp_bwd_reduce", programs, 2 * hidden * C + hidden + 2 * C, M)


def _fake_forward(
    x: Tensor, e: Tensor, modulation: Tensor, norm_weight: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor,
    post: bool, gelu: str, eps: float,
) -> Tensor:  # fmt: skip
    return torch.empty_like(x)


def _fake_backward(
    dy: Tensor, x: Tensor, e: Tensor, modulation: Tensor, norm_weight: Tensor, w1: Tensor, b1: Tensor, w2: Tensor,
    b2: Tensor, post: bool, gelu: str, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return tuple(map(torch.empty_like, (x, e, modulation, norm_weight, w1, b1, w2, b2)))


def _flops_forward(x: list[int], e: Any, modulation: Any, norm_weight: Any, w1: list[int], *_: Any, **__: Any) -> int:
    return 4 * x[0] * x[1] * w1[0] * w1[1]


def _flops_backward(
    dy: Any, x: list[int], e: Any, modulation: Any, norm_weight: Any, w1: list[int], *_: Any, **__: Any
) -> int:
    """Without the recomputation, as everywhere."""
    return 8 * x[0] * x[1] * w1[0] * w1[1]


@operator("pixel_mlp", _fake_forward, _flops_forward)
def pixel_mlp_forward(
    x: Tensor, e: Tensor, modulation: Tensor, norm_weight: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor,
    post: bool, gelu: str, eps: float,
) -> Tensor:  # fmt: skip
    y = torch.empty_like(x)
    M, C, hidden = x.shape[0] * x.shape[1], x.shape[2], w1.shape[0]
    blocks, launch = plan_forward(
        M, C, hidden, post, gelu, w1.dtype, x.element_size(), chosen("pixel_mlp", CONFIGS, C, hidden),
        multiprocessors(x.device),
    )  # fmt: skip
    launch.start(x, e, modulation, norm_weight, w1, b1, w2, b2, y, M, blocks, eps)
    return y


@operator("pixel_mlp_backward", _fake_backward, _flops_backward)
def pixel_mlp_backward(
    dy: Tensor, x: Tensor, e: Tensor, modulation: Tensor, norm_weight: Tensor, w1: Tensor, b1: Tensor, w2: Tensor,
    b2: Tensor, post: bool, gelu: str, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dx, de, dmodulation = map(torch.empty_like, (x, e, modulation))
    M, C, hidden = x.shape[0] * x.shape[1], x.shape[2], w1.shape[0]
    blocks, pixels, reduction = plan_backward(
        M, C, hidden, post, gelu, w1.dtype, x.element_size(), chosen("pixel_mlp", CONFIGS, C, hidden),
        multiprocessors(x.device),
    )  # fmt: skip
    partial = x.new_empty((pixels.grid, 2 * hidden * C + hidden + 2 * C), dtype=torch.float32)
    pixels.start(dy, x, e, modulation, norm_weight, w1, b1, w2, b2, dx, de, dmodulation, partial, M, blocks, eps)
    total = sum_partials(reduction, partial, torch.float32)
    dw1, dw2, db1, db2, dnorm_weight = total.split([hidden * C, hidden * C, hidden, C, C])
    parts = (dnorm_weight, norm_weight), (dw1.view(hidden, C), w1), (db1, b1), (dw2.view(hidden, C).t(), w2), (db2, b2)
    return dx, de, dmodulation, *(_own(part, like) for part, like in parts)


def _own(part: Tensor, like: Tensor) -> Tensor:
    """The values of part in memory of its own, in the type of like: operators return no views of one tensor."""
    return torch.empty_like(like).copy_(part)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:8])
    ctx.options = inputs[8:]


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return *pixel_mlp_backward(dy.contiguous(), *ctx.saved_tensors, *ctx.options), None, None, None


pixel_mlp_forward.gradient(_save, _backward)


def pixel_mlp(
    x_NPC: Tensor,
    e_NPC: Tensor,
    modulation: Tensor,
    norm_weight_C: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    *,
    post: bool = False,
    gelu: Gelu = "none",
    eps: float = 1e-6,
) -> Tensor:
    """Return y [N, P, C] in x's dtype. gelu: "none" for the exact error function, "tanh" for its approximation.

    Contiguous tensors, each float32, bfloat16 or float16; w1, b1, w2 and b2 share one type. Raises ValueError naming
    what does not fit.
    """
    if x_NPC.ndim != 3 or w1.ndim != 2:
        raise ValueError(f"pixel_mlp: x must be [N, P, C] and w1 [F, C], got {list(x_NPC.shape)}, {list(w1.shape)}")
    if gelu not in get_args(Gelu):
        raise ValueError(f"pixel_mlp: gelu must be one of {', '.join(get_args(Gelu))}, got {gelu!r}")
    (N, P, C), hidden = x_NPC.shape, w1.shape[0]
    check(
        "pixel_mlp",
        x_NPC,
        x=(x_NPC, (N, P, C)),
        e=(e_NPC, (N, P, C)),
        modulation=(modulation, (N, P, 4 * C)),
        norm_weight=(norm_weight_C, (C,)),
        w1=(w1, (hidden, C)),
        b1=(b1, (hidden,)),
        w2=(w2, (C, hidden)),
        b2=(b2, (C,)),
    )
    for name, parameter in {"b1": b1, "w2": w2, "b2": b2}.items():
        if parameter.dtype != w1.dtype:
            raise ValueError(f"pixel_mlp: {name} must be {w1.dtype} like w1, got {parameter.dtype}")
    arguments = (x_NPC, e_NPC, modulation, norm_weight_C, w1, b1, w2, b2, post, gelu, eps)
    chosen_body = body(x_NPC)
    if chosen_body == "reference":
        return pixel_mlp_reference(*arguments)
    return pixel_mlp_forward.apply(*arguments, body=chosen_body)
