// Gate of a SwiGLU layer:  y = silu(a) * b,   silu(a) = a s,  s = 1 / (1 + e^-a)
//
//     da = dy * b * s (1 + a (1 - s)),    db = dy * a s
//
// Backward writes y again for the layer that did not keep it. Twin of swiglu.py.
// Shapes: packed [..., 2 F] as (a | b); y [..., F].
#include "operator.h"
#include "vector_math.h"

namespace pixelgen {
namespace {

constexpr int64_t SWIGLU_ROWS = 8;  // rows of a task

MULTIVERSION void swiglu_fwd(const float* RESTRICT packed, float* RESTRICT y, int64_t rows, int64_t F) {
  for (int64_t n = 0; n < rows; n++, packed += 2 * F, y += F) {
    const float *RESTRICT a = packed, *RESTRICT b = packed + F;
#pragma omp simd
    for (int64_t f = 0; f < F; f++) y[f] = a[f] * sigmoid(a[f]) * b[f];
  }
}

MULTIVERSION void swiglu_bwd(
    const float* RESTRICT dy, const float* RESTRICT packed, float* RESTRICT dpacked, float* RESTRICT y, int64_t rows,
    int64_t F) {
  for (int64_t n = 0; n < rows; n++, packed += 2 * F, dpacked += 2 * F, dy += F, y += F) {
    const float *RESTRICT a = packed, *RESTRICT b = packed + F;
    float *RESTRICT da = dpacked, *RESTRICT db = dpacked + F;
#pragma omp simd
    for (int64_t f = 0; f < F; f++) {
      const float s = sigmoid(a[f]), silu = a[f] * s;
      da[f] = dy[f] * b[f] * s * (1.0f + a[f] * (1.0f - s));
      db[f] = dy[f] * silu;
      y[f] = silu * b[f];
    }
  }
}

Tensor swiglu(const Tensor& packed_) {
  const Tensor packed = in_float(packed_);
  const int64_t F = packed.size(-1) / 2, N = F ? packed.numel() / (2 * F) : 0;
  auto shape = packed.sizes().vec();
  shape.back() = F;
  Tensor y = at::empty(shape, packed.options());
  const float* px = packed.const_data_ptr<float>();
  float* py = y.data_ptr<float>();
  for_chunks(N, SWIGLU_ROWS, 4 * F, [&](int64_t, int64_t first, int64_t last) {
    swiglu_fwd(px + first * 2 * F, py + first * F, last - first, F);
  });
  return y.to(packed_.scalar_type());
}

std::tuple<Tensor, Tensor> swiglu_backward(const Tensor& dy_, const Tensor& packed_) {
  const Tensor dy = in_float(dy_), packed = in_float(packed_);
  const int64_t F = dy.size(-1), N = F ? dy.numel() / F : 0;
  Tensor dpacked = at::empty_like(packed), y = at::empty_like(dy);
  const float *pdy = dy.const_data_ptr<float>(), *px = packed.const_data_ptr<float>();
  float *pdx = dpacked.data_ptr<float>(), *py = y.data_ptr<float>();
  for_chunks(N, SWIGLU_ROWS, 4 * F, [&](int64_t, int64_t first, int64_t last) {
    swiglu_bwd(pdy + first * F, px + first * 2 * F, pdx + first * 2 * F, py + first * F, last - first, F);
  });
  return {dpacked.to(packed_.scalar_type()), y.to(dy_.scalar_type())};
}

struct SwiGLU : torch::autograd::Function<SwiGLU> {
  static Tensor forward(AutogradContext* ctx, const Tensor& packed) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({packed});
    static const auto run = op<decltype(swiglu)>("pixelgen::swiglu");
    return run.call(packed);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto run = op<decltype(swiglu_backward)>("pixelgen::swiglu_backward");
    return {std::get<0>(run.call(grads[0].contiguous(), ctx->get_saved_variables()[0]))};
  }
};

Tensor swiglu_autograd(const Tensor& packed) { return SwiGLU::apply(packed); }

TORCH_LIBRARY_IMPL(pixelgen, CPU, m) {
  m.impl("swiglu", swiglu);
  m.impl("swiglu_backward", swiglu_backward);
}
TORCH_LIBRARY_IMPL(pixelgen, AutogradCPU, m) {
  m.impl("swiglu", swiglu_autograd);
  m.impl("swiglu_backward", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace
}  // namespace pixelgen
