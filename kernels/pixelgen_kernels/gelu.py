"""GELU and its derivative inside kernels, exact and in the tanh form, in few instructions.

    exact   gelu(u) = u Phi(u) = max(u, 0) - |u| Q(|u|)           gelu'(u) = Phi(u) + u phi(u)
            Q(a) = 1 - Phi(a) = 2^p(a),  p a polynomial           phi(u) = 2^(-u^2 log2(e) / 2 - log2(2 pi) / 2)
    tanh    gelu(u) = u s,  s = 1 / (1 + 2^-y),  y = 2 log2(e) sqrt(2 / pi) (u + 0.044715 u^3)
            gelu'(u) = s + u s (1 - s) dy/du ln(2)

GELU: arXiv 1606.08415. The polynomial is the minimax fit of log2 Q on [0, 13.2], where |u| Q reaches the smallest
normal number, with the error weighted to 1e-6 absolute or 1.4e-4 relative, whichever is looser. One degree 9 is enough
for every data type: an error of 1e-6 in float32, and after rounding to bfloat16 at most 0.53 ulp in gelu and in gelu',
its zero at -0.7518 included. Its odd degree and negative leading coefficient take Q to 0 beyond the fit, and NaN stays
NaN.
Shapes: any; u, gelu and gelu' are float32 blocks. Finite u; the tanh form needs |u| < 1e19.
"""

from __future__ import annotations

import triton
import triton.language as tl

# log2(1 - Phi(a)) on [0, 13.2], constant term first
_P0 = tl.constexpr(-9.999975562e-01)
_P1 = tl.constexpr(-1.1512072086e00)
_P2 = tl.constexpr(-4.585673511e-01)
_P3 = tl.constexpr(-5.3933575749e-02)
_P4 = tl.constexpr(8.5760327056e-03)
_P5 = tl.constexpr(-9.8348024767e-04)
_P6 = tl.constexpr(7.6716751209e-05)
_P7 = tl.constexpr(-3.7996308038e-06)
_P8 = tl.constexpr(1.0640678738e-07)
_P9 = tl.constexpr(-1.2676418804e-09)
_HALF_LOG2E = tl.constexpr(0.7213475204444817)  # log2(e) / 2
_HALF_LOG2_2PI = tl.constexpr(1.3257480647361593)  # log2(2 pi) / 2
_TANH_Y1 = tl.constexpr(2.302208198144325)  # 2 log2(e) sqrt(2 / pi)
_TANH_Y3 = tl.constexpr(0.10294323958002349)  # 0.044715 times that
_TANH_D0 = tl.constexpr(1.5957691216057308)  # 2 sqrt(2 / pi)
_TANH_D2 = tl.constexpr(0.21406444881780073)  # 3 * 0.044715 times that


@triton.jit
def gelu(u, TANH: tl.constexpr):
    """gelu(u), float32."""
    if TANH:
        return u * _logistic(u, u * u)
    a = tl.abs(u)
    return tl.maximum(u, 0.0) - a * _tail(a)


@triton.jit
def gelu_and_derivative(u, TANH: tl.constexpr):
    """(gelu(u), gelu'(u)), float32."""
    if TANH:
        square = u * u
        s = _logistic(u, square)
        g = u * s
        return g, s + (g - g * s) * (_TANH_D0 + _TANH_D2 * square)
    a = tl.abs(u)
    q = _tail(a)
    phi = tl.exp2(u * (u * -_HALF_LOG2E) - _HALF_LOG2_2PI)
    r = q - a * phi
    return tl.maximum(u, 0.0) - a * q, tl.where(u > 0.0, 1.0 - r, r)


@triton.jit
def _tail(a):
    """1 - Phi(a) for a >= 0."""
    p = _P9 * a + _P8
    p = p * a + _P7
    p = p * a + _P6
    p = p * a + _P5
    p = p * a + _P4
    p = p * a + _P3
    p = p * a + _P2
    p = p * a + _P1
    return tl.exp2(p * a + _P0)


@triton.jit
def _logistic(u, square):
    """1 / (1 + 2^-y(u)), given u^2."""
    root = tl.rsqrt(1.0 + tl.exp2(u * (-_TANH_Y1 - _TANH_Y3 * square)))
    return root * root
