"""GELU inside kernels against float64 error functions, over every bfloat16 number."""

import math

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from pixelgen_kernels.gelu import gelu, gelu_and_derivative
from scipy import special


@triton.jit
def evaluate(u_ptr, g_ptr, both_ptr, d_ptr, TANH: tl.constexpr, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    u = tl.load(u_ptr + o)
    g, d = gelu_and_derivative(u, TANH)
    tl.store(g_ptr + o, gelu(u, TANH))
    tl.store(both_ptr + o, g)
    tl.store(d_ptr + o, d)


def run(u: torch.Tensor, tanh: bool) -> tuple[np.ndarray, np.ndarray]:
    """gelu and its derivative in float32."""
    padded = torch.zeros(65536, device=u.device)
    padded[: len(u)] = u
    g, both, d = (torch.full_like(padded, float("nan")) for _ in range(3))
    evaluate[(4,)](padded, g, both, d, TANH=tanh, BLOCK=16384)
    torch.testing.assert_close(g, both, rtol=0, atol=0, equal_nan=True)
    return g[: len(u)].cpu().numpy(), d[: len(u)].cpu().numpy()


def bfloat16_numbers(device: str) -> torch.Tensor:
    """All of them, finite, as float32."""
    u = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16).float()
    return u[u.isfinite()].to(device)


def exact(u: np.ndarray, tanh: bool) -> tuple[np.ndarray, np.ndarray]:
    """The definitions in float64."""
    if tanh:
        k = math.sqrt(2 / math.pi)
        # 1 + tanh(y) as a logistic, which keeps the relative accuracy of its tail
        s, ds = special.expit(2 * k * (u + 0.044715 * u**3)), 2 * k * (1 + 3 * 0.044715 * u**2)
        return u * s, s + u * s * special.expit(-2 * k * (u + 0.044715 * u**3)) * ds
    density = np.exp(-(u**2) / 2) / math.sqrt(2 * math.pi)
    return u * special.ndtr(u), special.ndtr(u) + u * density


def ulps(out: np.ndarray, ref: np.ndarray) -> np.ndarray:
    """Error of out, rounded to bfloat16, in units of the last place that bfloat16 has at ref."""
    rounded = torch.from_numpy(out).bfloat16().double().numpy()
    exponent = np.maximum(np.floor(np.log2(np.maximum(np.abs(ref), 1e-300))), -126)
    return np.abs(rounded - ref) / 2.0 ** (exponent - 7)


@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")
def test_exact_form_over_every_bfloat16(device):
    """Under 0.53 ulp of bfloat16, of which rounding is 0.5; the zero of gelu' at -0.7518 is no exception.

    A GPU's exponential is good to 2 ulp of float32 and gives 0 instead of numbers with fewer digits: there the zero is
    met to 2^-22, and results below 2^-120 are not counted.
    """
    u = bfloat16_numbers(device)
    assert len(u) == 65536 - 2 * 128
    exactly = u.double().cpu().numpy()
    for out, ref in zip(run(u, False), exact(exactly, False), strict=True):
        tiny = (np.abs(ref) < 2.0**-120) & (device == "cuda")
        zero = (np.abs(exactly + 0.7518) < 0.02) & (device == "cuda")
        assert ulps(out, ref)[~tiny & ~zero].max() < 0.53
        assert np.abs(out[tiny]).max(initial=0.0) < 2.0**-119
        assert np.abs(out - ref)[zero].max(initial=0.0) < 2.0**-22


@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")
def test_tanh_form_over_every_bfloat16(device):
    """The same wherever a result is above 2^-120; below, the exponential has overflowed and the result is 0."""
    u = bfloat16_numbers(device)
    u = u[u.abs() < 1e19]
    for out, ref in zip(run(u, True), exact(u.double().cpu().numpy(), True), strict=True):
        tiny = np.abs(ref) < 2.0**-120
        assert ulps(out, ref)[~tiny].max() < 0.53
        assert np.abs(out[tiny]).max() < 2.0**-119


@pytest.mark.filterwarnings("ignore:overflow encountered")
@pytest.mark.parametrize("tanh", [False, True])
def test_float32_accuracy(tanh, device):
    """Between bfloat16 numbers too: about 1e-6, also against PyTorch's own definition."""
    u = torch.linspace(-14, 14, 65536, device=device)
    (g, d), (g_ref, d_ref) = run(u, tanh), exact(u.double().cpu().numpy(), tanh)
    assert np.abs(g - g_ref).max() < 1.2e-6
    # the tanh form multiplies the rounding of s, near 1, by u dy/du
    assert np.abs(d - d_ref).max() < (8e-6 if tanh else 1.2e-6)
    leaf = u.double().cpu().requires_grad_()
    y = torch.nn.functional.gelu(leaf, approximate="tanh" if tanh else "none")
    np.testing.assert_allclose(g_ref, y.detach().numpy(), atol=1e-12)
    np.testing.assert_allclose(d_ref, torch.autograd.grad(y.sum(), leaf)[0].numpy(), atol=1e-12)


def test_nan_stays_nan(device):
    for tanh in (False, True):
        g, d = run(torch.tensor([float("nan")], device=device), tanh)
        assert np.isnan(g[0]) and np.isnan(d[0])
