// Softmax attention over few tokens, for CPU tensors whose head fits the cache.
//
//     P = softmax(s Q K^T),  O = P V,   s = 1 / sqrt(d)         lse_i = log2 sum_j 2^(s log2(e) q_i k_j)
//
//     dV = P^T dO,  dP = dO V^T,  dS = s P * (dP - sum_d dO * O),  dQ = dS K,  dK = dS^T Q
//
// A task is one head of one image. Its scores stay in the second-level cache, so that nothing is streamed in blocks,
// and K and V are transposed once where a product wants their columns. Backward computes P again from lse. PyTorch's
// kernel cuts queries and keys into blocks of hundreds, which costs several times more at 16 or 64 tokens.
// Shapes: q, k, v, out [B, L, H, d], d a multiple of LANES; lse [B, H, L]. Twin of attention_reference in attention.py.
#include "operator.h"
#include "small_product.h"
#include "vector_math.h"

namespace pixelgen {
namespace {

// One head: rows of d floats, `row` apart.
struct Head {
  const float* data;
  int64_t row;
};

// to [d, padded] = transposed [L, d], zeros past L.
INLINE void transpose(const Head& from, float* RESTRICT to, int64_t L, int64_t padded, int64_t d) {
  for (int64_t i = 0; i < d; i++) {
    for (int64_t l = 0; l < L; l++) to[i * padded + l] = from.data[l * from.row + i];
    for (int64_t l = L; l < padded; l++) to[i * padded + l] = 0.0f;
  }
}

MULTIVERSION void attention_fwd(
    const Head& q, const Head& k, const Head& v, float* out, int64_t out_row, float* RESTRICT lse,
    float* RESTRICT transposed, float* RESTRICT P, int64_t L, int64_t padded, int64_t d) {
  const float factor = LOG2E / std::sqrt(static_cast<float>(d));
  transpose(k, transposed, L, padded, d);
  product_any(L, padded, q.data, q.row, 1, transposed, padded, d, P, padded);
  for (int64_t i = 0; i < L; i++) {
    float* RESTRICT row = P + i * padded;
    float most = row[0], sum = 0.0f;
#pragma omp simd reduction(max : most)
    for (int64_t j = 0; j < L; j++) most = row[j] > most ? row[j] : most;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < L; j++) {
      row[j] = exp2_approx(factor * (row[j] - most));
      sum += row[j];
    }
    const float scale = 1.0f / sum;
#pragma omp simd
    for (int64_t j = 0; j < L; j++) row[j] *= scale;
    lse[i] = factor * most + std::log2(sum);
  }
  product_any(L, d, P, padded, 1, v.data, v.row, L, out, out_row);
}

MULTIVERSION void attention_bwd(
    const Head& dout, const Head& q, const Head& k, const Head& v, const Head& out, const float* RESTRICT lse,
    float* dq, float* dk, float* dv, int64_t grad_row, float* RESTRICT transposed, float* RESTRICT P,
    float* RESTRICT dS, int64_t L, int64_t padded, int64_t d) {
  const float s = 1.0f / std::sqrt(static_cast<float>(d)), factor = LOG2E * s;
  transpose(k, transposed, L, padded, d);
  product_any(L, padded, q.data, q.row, 1, transposed, padded, d, P, padded);
  transpose(v, transposed, L, padded, d);
  product_any(L, padded, dout.data, dout.row, 1, transposed, padded, d, dS, padded);
  for (int64_t i = 0; i < L; i++) {
    const float *RESTRICT o = out.data + i * out.row, *RESTRICT g = dout.data + i * dout.row;
    float delta = 0.0f;
#pragma omp simd reduction(+ : delta)
    for (int64_t c = 0; c < d; c++) delta += o[c] * g[c];
    float *RESTRICT p = P + i * padded, *RESTRICT ds = dS + i * padded;
    const float lse_i = lse[i];
#pragma omp simd
    for (int64_t j = 0; j < L; j++) {
      p[j] = exp2_approx(factor * p[j] - lse_i);
      ds[j] = s * p[j] * (ds[j] - delta);
    }
  }
  product_any(L, d, P, 1, padded, dout.data, dout.row, L, dv, grad_row);
  product_any(L, d, dS, padded, 1, k.data, k.row, L, dq, grad_row);
  product_any(L, d, dS, 1, padded, q.data, q.row, L, dk, grad_row);
}

// Head h of image b of a tensor [B, L, H, d] with unit stride along d.
INLINE Head head(const Tensor& x, int64_t b, int64_t h) {
  return {x.const_data_ptr<float>() + b * x.stride(0) + h * x.stride(2), x.stride(1)};
}

// Rows of whole cache lines.
int64_t padded_length(int64_t L) { return ceil_div(L, 16) * 16; }

std::tuple<Tensor, Tensor> attention(const Tensor& q, const Tensor& k, const Tensor& v) {
  const int64_t B = q.size(0), L = q.size(1), H = q.size(2), d = q.size(3), padded = padded_length(L);
  TORCH_CHECK_VALUE(
      d % LANES == 0 && q.scalar_type() == at::kFloat, "attention: float32 heads of a multiple of ", LANES);
  Tensor out = at::empty({B, L, H, d}, q.options()), lse = at::empty({B, H, L}, q.options());
  float *po = out.data_ptr<float>(), *pl = lse.data_ptr<float>();
  for_chunks(L ? B * H : 0, 1, L * (2 * d + padded), [&](int64_t n, int64_t, int64_t) {
    const int64_t b = n / H, h = n % H;
    Scratch memory(padded * (d + L));
    attention_fwd(
        head(q, b, h), head(k, b, h), head(v, b, h), po + (b * L * H + h) * d, H * d, pl + n * L,
        memory.take(padded * d), memory.take(padded * L), L, padded, d);
  });
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(
    const Tensor& dout_, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse) {
  const Tensor dout = rows_in_float(dout_);
  const int64_t B = q.size(0), L = q.size(1), H = q.size(2), d = q.size(3), padded = padded_length(L);
  Tensor dq = at::empty({B, L, H, d}, q.options()), dk = at::empty_like(dq), dv = at::empty_like(dq);
  float *pq = dq.data_ptr<float>(), *pk = dk.data_ptr<float>(), *pv = dv.data_ptr<float>();
  const float* pl = lse.const_data_ptr<float>();
  for_chunks(L ? B * H : 0, 1, 2 * L * (2 * d + padded), [&](int64_t n, int64_t, int64_t) {
    const int64_t b = n / H, h = n % H, o = (b * L * H + h) * d;
    Scratch memory(padded * (d + 2 * L));
    attention_bwd(
        head(dout, b, h), head(q, b, h), head(k, b, h), head(v, b, h), head(out, b, h), pl + n * L, pq + o, pk + o,
        pv + o, H * d, memory.take(padded * d), memory.take(padded * L), memory.take(padded * L), L, padded, d);
  });
  return {dq, dk, dv};
}

struct Attention : torch::autograd::Function<Attention> {
  static variable_list forward(AutogradContext* ctx, const Tensor& q, const Tensor& k, const Tensor& v) {
    at::AutoDispatchBelowADInplaceOrView guard;
    static const auto run = op<decltype(attention)>("pixelgen_native::attention");
    auto [out, lse] = run.call(q, k, v);
    ctx->save_for_backward({q, k, v, out, lse});
    ctx->mark_non_differentiable({lse});
    ctx->set_materialize_grads(false);
    return {out, lse};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    if (!grads[0].defined()) return {Tensor(), Tensor(), Tensor()};
    const auto s = ctx->get_saved_variables();
    static const auto run = op<decltype(attention_backward)>("pixelgen_native::attention_backward");
    auto [dq, dk, dv] = run.call(grads[0], s[0], s[1], s[2], s[3], s[4]);
    return {dq, dk, dv};
  }
};

std::tuple<Tensor, Tensor> attention_autograd(const Tensor& q, const Tensor& k, const Tensor& v) {
  const auto out = Attention::apply(q, k, v);
  return {out[0], out[1]};
}

TORCH_LIBRARY_IMPL(pixelgen_native, CPU, m) {
  m.impl("attention", attention);
  m.impl("attention_backward", attention_backward);
}
TORCH_LIBRARY_IMPL(pixelgen_native, AutogradCPU, m) {
  m.impl("attention", attention_autograd);
  m.impl("attention_backward", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace
}  // namespace pixelgen
