// Elementary functions that loops over floats can call: no branches, no tables, no library calls, so that the compiler
// vectorises the loops. NaN stays NaN. The GELU is that of gelu.py, coefficients and all.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "operator.h"

namespace pixelgen {

constexpr float LOG2E = 1.4426950408889634f, HALF_LOG2E = 0.7213475204444817f, HALF_LOG2_2PI = 1.3257480647361593f;

// 2^x, relative error 1e-7; 2^-126 below that, infinity above 127.5. x = i + f with |f| <= 1/2: a polynomial of 2^f,
// and 2^i from its bits.
INLINE float exp2_approx(float x) {
  x = x < -126.0f ? -126.0f : x;
  x = x > 128.0f ? 128.0f : x;
  const float rounder = 12582912.0f;  // 1.5 * 2^23: adding it leaves no fraction
  const float whole = (x + rounder) - rounder;
  const float f = x - whole;
  float p = 1.535336188319500e-4f;
  p = p * f + 1.339887440266574e-3f;
  p = p * f + 9.618437357674640e-3f;
  p = p * f + 5.550332471162809e-2f;
  p = p * f + 2.402264791363012e-1f;
  p = p * f + 6.931472028550421e-1f;
  p = p * f + 1.0f;
  const int32_t bits = (static_cast<int32_t>(whole) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return p * power;
}

INLINE float sigmoid(float x) { return 1.0f / (1.0f + exp2_approx(-LOG2E * x)); }

// 1 - Phi(a) for a >= 0.
INLINE float gelu_tail(float a) {
  float p = -1.2676418804e-09f;
  p = p * a + 1.0640678738e-07f;
  p = p * a + -3.7996308038e-06f;
  p = p * a + 7.6716751209e-05f;
  p = p * a + -9.8348024767e-04f;
  p = p * a + 8.5760327056e-03f;
  p = p * a + -5.3933575749e-02f;
  p = p * a + -4.585673511e-01f;
  p = p * a + -1.1512072086e00f;
  p = p * a + -9.999975562e-01f;
  return exp2_approx(p);
}

struct ValueAndSlope {
  float value, slope;
};

// gelu(u) = max(u, 0) - |u| Q(|u|),  Q = 1 - Phi;   gelu'(u) = Phi(u) + u phi(u)
INLINE float gelu(float u) {
  const float a = std::fabs(u);
  return (u < 0.0f ? 0.0f : u) - a * gelu_tail(a);
}

INLINE ValueAndSlope gelu_and_slope(float u) {
  const float a = std::fabs(u), q = gelu_tail(a);
  const float phi = exp2_approx(u * (u * -HALF_LOG2E) - HALF_LOG2_2PI);
  const float r = q - a * phi;
  return {(u < 0.0f ? 0.0f : u) - a * q, u > 0.0f ? 1.0f - r : r};
}

// gelu(u) = u s,  s = sigmoid(2 sqrt(2 / pi) (u + 0.044715 u^3))
INLINE float gelu_tanh(float u) { return u * sigmoid(u * (1.5957691216057308f + 0.07135481282553667f * u * u)); }

INLINE ValueAndSlope gelu_tanh_and_slope(float u) {
  const float square = u * u, s = sigmoid(u * (1.5957691216057308f + 0.07135481282553667f * square));
  const float g = u * s;
  return {g, s + (g - g * s) * (1.5957691216057308f + 0.21406444881780073f * square)};
}

}  // namespace pixelgen
