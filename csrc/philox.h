// Counter-based random numbers: the words of philox.py bit for bit, its normal numbers to rounding.
//
// Philox4x32-10 (Salmon et al., SC 2011), keyed by the run's seed and counted by (element // 4, image number low, image
// number high, stream). Box-Muller: words (2i, 2i + 1) give the numbers (2i, 2i + 1); the sine is that of
// patch_projection.py. Everything inlines and vectorises over counters.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "operator.h"

namespace pixelgen {

constexpr uint32_t STREAM_NOISE = 0;

struct Words {
  uint32_t w0, w1, w2, w3;
};

INLINE Words philox4x32(uint64_t seed, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; round++) {
    const uint64_t a = static_cast<uint64_t>(c0) * 0xD2511F53u, b = static_cast<uint64_t>(c2) * 0xCD9E8D57u;
    const uint32_t n0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ k0, n2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(b);
    c3 = static_cast<uint32_t>(a);
    c0 = n0;
    c2 = n2;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {c0, c1, c2, c3};
}

// (top 23 bits + 1/2) / 2^23
INLINE float unit(uint32_t word) { return (static_cast<float>(static_cast<int32_t>(word >> 9)) + 0.5f) * 0x1p-23f; }

// Natural logarithm of a normal positive number: x = 2^i m with m in [sqrt(1/2), sqrt(2)), a polynomial of log m.
INLINE float log_approx(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const int32_t i = (bits - 0x3f3504f3) >> 23;
  bits -= i << 23;
  float m;
  std::memcpy(&m, &bits, sizeof m);
  const float f = m - 1.0f, square = f * f;
  float p = 7.0376836292e-2f;
  p = p * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  const float e = static_cast<float>(i);
  return e * 0.693359375f + (f + (p * f * square - 2.12194440e-4f * e - 0.5f * square));
}

// sin(2 pi a) for |a| <= 1/4
INLINE float sine(float a) {
  const float s = a * a;
  const float p = (((-14.337024388f * s + 41.999989776f) * s - 76.703667824f) * s + 81.605209431f) * s - 41.341701930f;
  return a * (p * s + 6.2831853065f);
}

// Two normal numbers from two words.
INLINE void box_muller(uint32_t first, uint32_t second, float& a, float& b) {
  const float radius = std::sqrt(-2.0f * log_approx(unit(first)));
  const float q = unit(second) - 0.5f, c = std::fabs(q) - 0.25f;
  const float s = sine(0.25f - std::fabs(c));
  a = radius * sine(c);
  b = radius * (q < 0.0f ? s : -s);
}

}  // namespace pixelgen
