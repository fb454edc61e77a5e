// Per-head RMSNorm of queries and keys and rotary position embedding, straight from the packed projection.
//
//     q' = R n w,  n = q r,  r = 1 / sqrt(mean(q^2) + eps),  R: (a, b) -> (a cos - b sin, a sin + b cos)
//          for each pair (a, b) of consecutive features; the same for k, and v passes through
//     g  = R^T dq',    dq = r (g w - n mean(g w n)),    dw = sum_{B, L, H} g n
//
// Backward takes r from the projection again and writes the packed gradient, v's part included, in one pass; a chunk of
// tokens has one partial sum of each weight's gradient. Twin of qk_norm_rope.py.
// Shapes: qkv [B, L, 3 H d]; weights [d]; cos, sin [L, d / 2]; q, k [B, L, H, d]. A row is one head of one token.
#include "operator.h"

namespace pixelgen {
namespace {

constexpr int64_t ROPE_TOKENS = 32;  // of a chunk

INLINE float inverse_rms(const float* RESTRICT x, int64_t d, float eps) {
  float square = 0.0f;
#pragma omp simd reduction(+ : square)
  for (int64_t i = 0; i < d; i++) square += x[i] * x[i];
  return 1.0f / std::sqrt(square / d + eps);
}

// The H rows of one of q and k of one token.
MULTIVERSION void norm_rotate_fwd(
    const float* RESTRICT x, const float* RESTRICT norm_weight, const float* RESTRICT cos, const float* RESTRICT sin,
    float* RESTRICT out, int64_t H, int64_t d, float eps) {
  for (int64_t h = 0; h < H; h++, x += d, out += d) {
    const float r = inverse_rms(x, d, eps);
#pragma omp simd
    for (int64_t i = 0; i < d / 2; i++) {
      const float a = x[2 * i] * r * norm_weight[2 * i], b = x[2 * i + 1] * r * norm_weight[2 * i + 1];
      out[2 * i] = a * cos[i] - b * sin[i];
      out[2 * i + 1] = a * sin[i] + b * cos[i];
    }
  }
}

// g [d] is scratch; dnorm_weight [d] is added to.
MULTIVERSION void norm_rotate_bwd(
    const float* RESTRICT dout, const float* RESTRICT x, const float* RESTRICT norm_weight, const float* RESTRICT cos,
    const float* RESTRICT sin, float* RESTRICT dx, float* RESTRICT dnorm_weight, float* RESTRICT g, int64_t H,
    int64_t d, float eps) {
  for (int64_t h = 0; h < H; h++, dout += d, x += d, dx += d) {
    const float r = inverse_rms(x, d, eps);
#pragma omp simd
    for (int64_t i = 0; i < d / 2; i++) {
      g[2 * i] = dout[2 * i] * cos[i] + dout[2 * i + 1] * sin[i];
      g[2 * i + 1] = dout[2 * i + 1] * cos[i] - dout[2 * i] * sin[i];
    }
    float dot = 0.0f;
#pragma omp simd reduction(+ : dot)
    for (int64_t i = 0; i < d; i++) {
      const float gn = g[i] * x[i] * r;
      dnorm_weight[i] += gn;
      dot += gn * norm_weight[i];
    }
    const float mean = dot / d;
#pragma omp simd
    for (int64_t i = 0; i < d; i++) dx[i] = r * (g[i] * norm_weight[i] - x[i] * r * mean);
  }
}

std::tuple<Tensor, Tensor> qk_norm_rope(
    const Tensor& qkv_, const Tensor& q_norm_weight_, const Tensor& k_norm_weight_, const Tensor& cos_,
    const Tensor& sin_, int64_t heads, double eps) {
  const Tensor qkv = in_float(qkv_), q_norm_weight = in_float(q_norm_weight_), k_norm_weight = in_float(k_norm_weight_),
               cos = in_float(cos_), sin = in_float(sin_);
  const int64_t B = qkv.size(0), L = qkv.size(1), H = heads, d = qkv.size(2) / (3 * H);
  Tensor q = at::empty({B, L, H, d}, qkv.options()), k = at::empty_like(q);
  const float *px = qkv.const_data_ptr<float>(), *pqw = q_norm_weight.const_data_ptr<float>(),
              *pkw = k_norm_weight.const_data_ptr<float>(), *pc = cos.const_data_ptr<float>(),
              *ps = sin.const_data_ptr<float>();
  float *pq = q.data_ptr<float>(), *pk = k.data_ptr<float>();
  for_chunks(B * L, ROPE_TOKENS, 3 * H * d, [&](int64_t, int64_t first, int64_t last) {
    for (int64_t n = first; n < last; n++) {
      const float *c = pc + n % L * (d / 2), *s = ps + n % L * (d / 2), *x = px + n * 3 * H * d;
      norm_rotate_fwd(x, pqw, c, s, pq + n * H * d, H, d, eps);
      norm_rotate_fwd(x + H * d, pkw, c, s, pk + n * H * d, H, d, eps);
    }
  });
  return {q.to(qkv_.scalar_type()), k.to(qkv_.scalar_type())};
}

std::tuple<Tensor, Tensor> qk_norm_rope_backward(
    const Tensor& dq_, const Tensor& dk_, const Tensor& dv_, const Tensor& qkv_, const Tensor& q_norm_weight_,
    const Tensor& k_norm_weight_, const Tensor& cos_, const Tensor& sin_, double eps) {
  const Tensor dq = in_float(dq_), dk = in_float(dk_), dv = in_float(dv_), qkv = in_float(qkv_),
               q_norm_weight = in_float(q_norm_weight_), k_norm_weight = in_float(k_norm_weight_), cos = in_float(cos_),
               sin = in_float(sin_);
  const int64_t B = dq.size(0), L = dq.size(1), H = dq.size(2), d = dq.size(3);
  Tensor dqkv = at::empty_like(qkv), partial = at::zeros({ceil_div(B * L, ROPE_TOKENS), 2, d}, qkv.options());
  const float *pdq = dq.const_data_ptr<float>(), *pdk = dk.const_data_ptr<float>(), *pdv = dv.const_data_ptr<float>(),
              *px = qkv.const_data_ptr<float>(), *pqw = q_norm_weight.const_data_ptr<float>(),
              *pkw = k_norm_weight.const_data_ptr<float>(), *pc = cos.const_data_ptr<float>(),
              *ps = sin.const_data_ptr<float>();
  float *pdx = dqkv.data_ptr<float>(), *pp = partial.data_ptr<float>();
  for_chunks(B * L, ROPE_TOKENS, 6 * H * d, [&](int64_t chunk, int64_t first, int64_t last) {
    std::vector<float> g(d);
    float* dnorm_weight = pp + chunk * 2 * d;
    for (int64_t n = first; n < last; n++) {
      const float *c = pc + n % L * (d / 2), *s = ps + n % L * (d / 2), *x = px + n * 3 * H * d;
      float* dx = pdx + n * 3 * H * d;
      norm_rotate_bwd(pdq + n * H * d, x, pqw, c, s, dx, dnorm_weight, g.data(), H, d, eps);
      norm_rotate_bwd(pdk + n * H * d, x + H * d, pkw, c, s, dx + H * d, dnorm_weight + d, g.data(), H, d, eps);
      std::copy_n(pdv + n * H * d, H * d, dx + 2 * H * d);
    }
  });
  return {dqkv.to(qkv_.scalar_type()), sum_partials(partial).to(q_norm_weight_.scalar_type())};
}

TORCH_LIBRARY_IMPL(pixelgen, CPU, m) {
  m.impl("qk_norm_rope", qk_norm_rope);
  m.impl("qk_norm_rope_backward", qk_norm_rope_backward);
}
TORCH_LIBRARY_IMPL(pixelgen, AutogradCPU, m) {
  m.impl("qk_norm_rope", torch::autograd::autogradNotImplementedFallback());
  m.impl("qk_norm_rope_backward", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace
}  // namespace pixelgen
