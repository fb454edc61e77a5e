// RMSNorm over the channels of each pixel and its own modulation.
//
//     y = n * norm_weight * (1 + scale) + shift      (shift | scale) = modulation, both 0 without one
//     n = x r,  r = 1 / sqrt(mean_C(x^2) + eps)
//
//     u  = dy * norm_weight * (1 + scale)
//     dx = r (u - n mean_C(u n)),   dshift = dy,   dscale = dy * norm_weight * n
//     dnorm_weight = sum_pixels dy * (1 + scale) * n
//
// The usual numbers of channels are constants of the loops, so that a pixel lives in registers. Twin of
// pixel_modulate.py. Shapes: x, y [N, P, C]; norm_weight [C]; modulation [N, P, 2 C]; M = N P pixels.
#include "operator.h"

namespace pixelgen {
namespace {

constexpr int64_t MODULATE_PIXELS = 512;  // of a chunk

// Channels of a pixel: a constant where C > 0.
template <int C>
INLINE void pixel_modulate_fwd_pixels(
    const float* RESTRICT x, const float* RESTRICT norm_weight, const float* RESTRICT mod, float* RESTRICT y,
    int64_t pixels, int64_t channels, float eps) {
  const int64_t c_end = C ? C : channels;
  for (int64_t m = 0; m < pixels; m++, x += c_end, y += c_end) {
    float square = 0.0f;
#pragma omp simd reduction(+ : square)
    for (int64_t c = 0; c < c_end; c++) square += x[c] * x[c];
    const float r = 1.0f / std::sqrt(square / c_end + eps);
    if (mod) {
      const float *RESTRICT shift = mod, *RESTRICT scale = mod + c_end;
#pragma omp simd
      for (int64_t c = 0; c < c_end; c++) y[c] = x[c] * r * norm_weight[c] * (1.0f + scale[c]) + shift[c];
      mod += 2 * c_end;
    } else {
#pragma omp simd
      for (int64_t c = 0; c < c_end; c++) y[c] = x[c] * r * norm_weight[c];
    }
  }
}

template <int C>
INLINE void pixel_modulate_bwd_pixels(
    const float* RESTRICT dy, const float* RESTRICT x, const float* RESTRICT norm_weight, const float* RESTRICT mod,
    float* RESTRICT dx, float* RESTRICT dmod, float* RESTRICT dnorm_weight, int64_t pixels, int64_t channels,
    float eps) {
  const int64_t c_end = C ? C : channels;
  for (int64_t m = 0; m < pixels; m++, dy += c_end, x += c_end, dx += c_end) {
    float square = 0.0f;
#pragma omp simd reduction(+ : square)
    for (int64_t c = 0; c < c_end; c++) square += x[c] * x[c];
    const float r = 1.0f / std::sqrt(square / c_end + eps);
    const float* RESTRICT scale = mod ? mod + c_end : nullptr;
    float dot = 0.0f;
#pragma omp simd reduction(+ : dot)
    for (int64_t c = 0; c < c_end; c++) {
      const float n = x[c] * r, dn = scale ? dy[c] * (1.0f + scale[c]) : dy[c];
      dnorm_weight[c] += dn * n;
      dot += dn * norm_weight[c] * n;
    }
    const float mean = dot / c_end;
#pragma omp simd
    for (int64_t c = 0; c < c_end; c++) {
      const float n = x[c] * r, dn = scale ? dy[c] * (1.0f + scale[c]) : dy[c];
      dx[c] = r * (dn * norm_weight[c] - n * mean);
    }
    if (mod) {
      float *RESTRICT dshift = dmod, *RESTRICT dscale = dmod + c_end;
#pragma omp simd
      for (int64_t c = 0; c < c_end; c++) {
        dshift[c] = dy[c];
        dscale[c] = dy[c] * norm_weight[c] * (x[c] * r);
      }
      mod += 2 * c_end, dmod += 2 * c_end;
    }
  }
}

MULTIVERSION void pixel_modulate_fwd(
    const float* x, const float* norm_weight, const float* mod, float* y, int64_t pixels, int64_t C, float eps) {
  switch (C) {
    case 8: return pixel_modulate_fwd_pixels<8>(x, norm_weight, mod, y, pixels, C, eps);
    case 16: return pixel_modulate_fwd_pixels<16>(x, norm_weight, mod, y, pixels, C, eps);
    case 32: return pixel_modulate_fwd_pixels<32>(x, norm_weight, mod, y, pixels, C, eps);
    default: return pixel_modulate_fwd_pixels<0>(x, norm_weight, mod, y, pixels, C, eps);
  }
}

MULTIVERSION void pixel_modulate_bwd(
    const float* dy, const float* x, const float* norm_weight, const float* mod, float* dx, float* dmod,
    float* dnorm_weight, int64_t pixels, int64_t C, float eps) {
  switch (C) {
    case 8: return pixel_modulate_bwd_pixels<8>(dy, x, norm_weight, mod, dx, dmod, dnorm_weight, pixels, C, eps);
    case 16: return pixel_modulate_bwd_pixels<16>(dy, x, norm_weight, mod, dx, dmod, dnorm_weight, pixels, C, eps);
    case 32: return pixel_modulate_bwd_pixels<32>(dy, x, norm_weight, mod, dx, dmod, dnorm_weight, pixels, C, eps);
    default: return pixel_modulate_bwd_pixels<0>(dy, x, norm_weight, mod, dx, dmod, dnorm_weight, pixels, C, eps);
  }
}

Tensor pixel_modulate(const Tensor& x_, const Tensor& norm_weight_, const OptionalTensor& modulation_, double eps) {
  const Tensor x = in_float(x_), norm_weight = in_float(norm_weight_),
               modulation = modulation_ ? in_float(*modulation_) : Tensor();
  const int64_t M = x.size(0) * x.size(1), C = x.size(2);
  Tensor y = at::empty_like(x);
  const float *px = x.const_data_ptr<float>(), *pw = norm_weight.const_data_ptr<float>(),
              *pm = modulation_ ? modulation.const_data_ptr<float>() : nullptr;
  float* py = y.data_ptr<float>();
  for_chunks(M, MODULATE_PIXELS, 4 * C, [&](int64_t, int64_t first, int64_t last) {
    pixel_modulate_fwd(px + first * C, pw, pm ? pm + first * 2 * C : nullptr, py + first * C, last - first, C, eps);
  });
  return y.to(x_.scalar_type());
}

std::tuple<Tensor, Tensor, Tensor> pixel_modulate_backward(
    const Tensor& dy_, const Tensor& x_, const Tensor& norm_weight_, const OptionalTensor& modulation_, double eps) {
  const Tensor dy = in_float(dy_), x = in_float(x_), norm_weight = in_float(norm_weight_),
               modulation = modulation_ ? in_float(*modulation_) : Tensor();
  const int64_t M = x.size(0) * x.size(1), C = x.size(2);
  Tensor dx = at::empty_like(x), dmodulation = modulation_ ? at::empty_like(modulation) : at::empty({0}, x.options());
  Tensor partial = at::zeros({ceil_div(M, MODULATE_PIXELS), C}, x.options());
  const float *pdy = dy.const_data_ptr<float>(), *px = x.const_data_ptr<float>(),
              *pw = norm_weight.const_data_ptr<float>(),
              *pm = modulation_ ? modulation.const_data_ptr<float>() : nullptr;
  float *pdx = dx.data_ptr<float>(), *pdm = dmodulation.data_ptr<float>(), *pp = partial.data_ptr<float>();
  for_chunks(M, MODULATE_PIXELS, 8 * C, [&](int64_t chunk, int64_t first, int64_t last) {
    const int64_t o = first * C;
    pixel_modulate_bwd(
        pdy + o, px + o, pw, pm ? pm + 2 * o : nullptr, pdx + o, pm ? pdm + 2 * o : nullptr, pp + chunk * C,
        last - first, C, eps);
  });
  const auto modulation_type = modulation_ ? modulation_->scalar_type() : x_.scalar_type();
  return {
      dx.to(x_.scalar_type()), sum_partials(partial).to(norm_weight_.scalar_type()), dmodulation.to(modulation_type)};
}

struct PixelModulate : torch::autograd::Function<PixelModulate> {
  static Tensor forward(
      AutogradContext* ctx, const Tensor& x, const Tensor& norm_weight, const OptionalTensor& modulation, double eps) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({x, norm_weight, modulation.value_or(Tensor())});
    ctx->saved_data["eps"] = eps;
    static const auto run = op<decltype(pixel_modulate)>("pixelgen::pixel_modulate");
    return run.call(x, norm_weight, modulation, eps);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const auto modulation = saved[2].defined() ? OptionalTensor(saved[2]) : std::nullopt;
    static const auto run = op<decltype(pixel_modulate_backward)>("pixelgen::pixel_modulate_backward");
    auto [dx, dnorm_weight, dmodulation] =
        run.call(grads[0].contiguous(), saved[0], saved[1], modulation, ctx->saved_data["eps"].toDouble());
    return {dx, dnorm_weight, modulation ? dmodulation : Tensor(), Tensor()};
  }
};

Tensor pixel_modulate_autograd(
    const Tensor& x, const Tensor& norm_weight, const OptionalTensor& modulation, double eps) {
  return PixelModulate::apply(x, norm_weight, modulation, eps);
}

TORCH_LIBRARY_IMPL(pixelgen, CPU, m) {
  m.impl("pixel_modulate", pixel_modulate);
  m.impl("pixel_modulate_backward", pixel_modulate_backward);
}
TORCH_LIBRARY_IMPL(pixelgen, AutogradCPU, m) {
  m.impl("pixel_modulate", pixel_modulate_autograd);
  m.impl("pixel_modulate_backward", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace
}  // namespace pixelgen
