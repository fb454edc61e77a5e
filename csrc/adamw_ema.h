// The arithmetic of one AdamW and EMA update, for the CPU body, the CUDA kernel and their tests.
//
//     m <- b1 m + (1 - b1) g                    v <- b2 v + (1 - b2) g^2          g = grad_scale * grad
//     p <- (1 - lr w) p - lr (m / (1 - b1^s)) / (sqrt(v / (1 - b2^s)) + eps)
//     a <- d a + (1 - d) p                      for each average a with its decay d
//
// Loshchilov & Hutter, ICLR 2019, algorithm 2; twin of kernels/pixelgen_kernels/adamw_ema.py.
#pragma once

#include <cmath>

#if defined(__CUDACC__)
#define PIXELGEN_UPDATE __host__ __device__ inline
#else
#define PIXELGEN_UPDATE static inline __attribute__((always_inline))
#endif

namespace pixelgen {

constexpr int MOST_EMAS = 4;

// What is the same for all elements of a step.
struct AdamWStep {
  float grad_scale, beta1, one_minus_beta1, beta2, one_minus_beta2, eps;
  float rate;         // lr / (1 - b1^s)
  float correction2;  // 1 / (1 - b2^s)
  float keep_weight;  // 1 - lr w
};

// The corrections are taken in double precision: 1 - b^s loses digits to cancellation in float.
inline AdamWStep adamw_step(
    double lr, double beta1, double beta2, double eps, double weight_decay, double step, double grad_scale) {
  const auto one_minus_power = [step](double b) { return b > 0.0 ? -std::expm1(step * std::log(b)) : 1.0; };
  AdamWStep s;
  s.grad_scale = static_cast<float>(grad_scale);
  s.beta1 = static_cast<float>(beta1);
  s.one_minus_beta1 = static_cast<float>(1.0 - beta1);
  s.beta2 = static_cast<float>(beta2);
  s.one_minus_beta2 = static_cast<float>(1.0 - beta2);
  s.eps = static_cast<float>(eps);
  s.rate = static_cast<float>(lr / one_minus_power(beta1));
  s.correction2 = static_cast<float>(1.0 / one_minus_power(beta2));
  s.keep_weight = static_cast<float>(1.0 - lr * weight_decay);
  return s;
}

// One element: m, v and p are updated, the new p is returned.
PIXELGEN_UPDATE float adamw_update(const AdamWStep& s, float grad, float& m, float& v, float& p) {
  const float g = s.grad_scale * grad;
  m = s.beta1 * m + s.one_minus_beta1 * g;
  v = s.beta2 * v + s.one_minus_beta2 * g * g;
  p = s.keep_weight * p - s.rate * m / (sqrtf(v * s.correction2) + s.eps);
  return p;
}

PIXELGEN_UPDATE float ema_update(float one_minus_decay, float average, float p) {
  return average + one_minus_decay * (p - average);
}

}  // namespace pixelgen
