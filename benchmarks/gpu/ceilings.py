"""What this device reaches: a copy, our matrix products, attention. The rest of the visit is judged by it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from machine import spread
from pixelgen_kernels.shapes import MODELS, ModelShape
from timing import Timer
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpu.child import device

BACKENDS = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)


def products(shape: ModelShape) -> dict[str, tuple[int, int, int]]:
    """Name -> (rows, outputs, inputs) of a model's matrix products."""
    N, D, S = shape.rows, shape.width, shape.pixels * shape.channels
    return {
        "qkv": (N, 3 * D, D), "projection": (N, D, D), "feed-forward in": (N, 2 * shape.ffn, D),
        "feed-forward out": (N, D, shape.ffn), "pixel modulation 2": (N, 2 * S, D), "pixel modulation 4": (N, 4 * S, D),
        "compress": (N, D, S), "expand": (N, S, D),
    }  # fmt: skip


def measure(
    row: Callable[..., None], device_free: Callable[[], None], models: list[str], images: int, copied: int, square: int,
    rounds: int,
) -> None:  # fmt: skip
    """copied: bytes of the copy. square: size of the matrix product that stands for the ceiling."""
    device_free()
    place = device()
    timer, dtype = Timer(place), torch.bfloat16 if place == "cuda" else torch.float32

    def median(call: Callable[[], Any]) -> float:
        for _ in range(3):
            call()
        return spread(timer(call) for _ in range(rounds))[1]

    source = torch.randn(copied // 4, device=place)
    target = torch.empty_like(source)
    ms = median(lambda: target.copy_(source))
    row(what="copy", ms=ms, tb_per_s=2 * source.nbytes / ms / 1e9)
    sizes = {("", "square"): (square, square, square)}
    for name in models:
        sizes |= {(name, what): size for what, size in products(MODELS[name].with_batch(images)).items()}
    for (model, what), (m, out, inner) in sizes.items():
        x, w, d = (torch.randn(*s, device=place, dtype=dtype) for s in ((m, inner), (out, inner), (m, out)))
        for direction, call in _directions(x, w, d).items():
            ms = median(call)
            row(
                what=f"product {what}", model=model, direction=direction, shape=[m, out, inner], ms=ms,
                tflop_per_s=2 * m * out * inner / ms / 1e9,
            )  # fmt: skip
    for name in models:
        attention(row, median, MODELS[name].with_batch(images), dtype, place)


def _directions(x: torch.Tensor, w: torch.Tensor, d: torch.Tensor) -> dict[str, Callable[[], Any]]:
    return {"forward": lambda: F.linear(x, w), "input gradient": lambda: d @ w, "weight gradient": lambda: d.t() @ x}


def attention(
    row: Callable[..., None], median: Callable[..., float], shape: ModelShape, dtype: torch.dtype, place: str
) -> None:
    size = (shape.batch, shape.heads, shape.tokens, shape.head_dim)
    q, k, v = (torch.randn(size, device=place, dtype=dtype, requires_grad=True) for _ in range(3))
    flops = 4 * shape.batch * shape.heads * shape.tokens**2 * shape.head_dim
    for backend in BACKENDS:
        about = {"what": f"attention {backend.name.lower()}", "model": shape.name, "head_dim": shape.head_dim}
        try:
            with sdpa_kernel(backend):
                out = F.scaled_dot_product_attention(q, k, v)
                dout = torch.randn_like(out)
                forward = median(lambda: F.scaled_dot_product_attention(q, k, v))
                backward = median(
                    lambda out=out, dout=dout: torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)
                )
        except RuntimeError as error:  # a backend refuses what it has no kernel for
            row(**about, absent=str(error).splitlines()[0][:160])
            continue
        row(
            **about, forward_ms=forward, backward_ms=backward, forward_tflop_per_s=flops / forward / 1e9,
            backward_tflop_per_s=2.5 * flops / backward / 1e9,
        )  # fmt: skip
