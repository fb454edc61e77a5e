// The per-pixel half of a pixel block: residual of the attention branch, norm, modulation, MLP, residual.
//
//     gated   m = x + gate1 * e                       modulation = (gate1 | shift2 | scale2 | gate2)
//             y = m + gate2 * MLP(n * norm_weight * (1 + scale2) + shift2)
//     post    m = x + (1 + scale1) * e + shift1       modulation = (scale1 | shift1 | scale2 | shift2)
//             y = m + (1 + scale2) * MLP(n * norm_weight) + shift2
//     n = m r,  r = 1 / sqrt(mean_C(m^2) + eps)       MLP(h) = W2 gelu(u) + b2,  u = W1 h + b1
//
//     do = dy * gate2,  du = (do W2) * gelu'(u),  dh = du W1,  dW2 = sum do^T gelu(u),  dW1 = sum du^T h
//     dn = dh * norm_weight * (1 + scale2),  dm = dy + r (dn - n mean_C(dn n)) = dx,  de = dm * gate1,  dgate1 = dm * e
//     dscale2 = dh * n * norm_weight,  dshift2 = dh,  dgate2 = dy * MLP(h)            (gated; post likewise)
//
// A tile of pixels goes through all of it in the first-level cache (small_product.h). Backward computes the hidden
// layer again. A chunk of pixels has its partial sums of the weights' gradients. Twin of pixel_mlp.py.
// Shapes: x, e, y [N, P, C]; modulation [N, P, 4 C]; norm_weight [C]; W1 [F, C]; b1 [F]; W2 [C, F]; b2 [C]; M = N P.
#include "operator.h"
#include "small_product.h"
#include "vector_math.h"

namespace pixelgen {
namespace {

constexpr int64_t TILE = 16, MLP_PIXELS = 1024;  // pixels of a tile, of a chunk

// Rows of N packed columns, N a constant where it is not 0.
template <int N>
INLINE void rows_product(
    int64_t rows, int64_t columns, const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t K,
    const float* start, int64_t start_row, float* out) {
  if constexpr (N != 0) {
    product(rows, N, a, a_row, a_step, b, N, K, start, start_row, out, N);
  } else {
    for (int64_t r = 0; r < rows; r++) {
      for (int64_t n = 0; n < columns; n++) out[r * columns + n] = start ? start[r * start_row + n] : 0.0f;
      for (int64_t k = 0; k < K; k++) {
        const float value = a[r * a_row + k * a_step];
#pragma omp simd
        for (int64_t n = 0; n < columns; n++) out[r * columns + n] += value * b[k * columns + n];
      }
    }
  }
}

struct Weights {
  int64_t C, F;
  bool post, tanh;
  float eps;
  const float *norm_weight, *w1, *b1, *w2, *b2;  // W1 [F, C], W2 [C, F]
  const float *w1t, *w2t;                 // [C, F], [F, C]
};

// What a tile computes: n, h [TILE, C]; r [TILE]; u, g [TILE, F] (g is also gelu's slope, then du); o [TILE, C].
struct Tile {
  float *n, *h, *r, *u, *g, *o, *m;
};

// Residual, norm and modulation of one pixel: m, r, n, h.
template <int CHANNELS>
INLINE void enter(
    const Weights& w, const float* RESTRICT x, const float* RESTRICT e, const float* RESTRICT mod, float* RESTRICT m,
    float* RESTRICT n, float* RESTRICT h, float& r) {
  const int64_t C = CHANNELS ? CHANNELS : w.C;
  float square = 0.0f;
  if (w.post) {
    const float *RESTRICT scale1 = mod, *RESTRICT shift1 = mod + C;
#pragma omp simd reduction(+ : square)
    for (int64_t c = 0; c < C; c++) {
      m[c] = x[c] + (1.0f + scale1[c]) * e[c] + shift1[c];
      square += m[c] * m[c];
    }
  } else {
    const float* RESTRICT gate1 = mod;
#pragma omp simd reduction(+ : square)
    for (int64_t c = 0; c < C; c++) {
      m[c] = x[c] + gate1[c] * e[c];
      square += m[c] * m[c];
    }
  }
  r = 1.0f / std::sqrt(square / C + w.eps);
  if (w.post) {
#pragma omp simd
    for (int64_t c = 0; c < C; c++) {
      n[c] = m[c] * r;
      h[c] = n[c] * w.norm_weight[c];
    }
  } else {
    const float *RESTRICT shift2 = mod + C, *RESTRICT scale2 = mod + 2 * C;
#pragma omp simd
    for (int64_t c = 0; c < C; c++) {
      n[c] = m[c] * r;
      h[c] = n[c] * w.norm_weight[c] * (1.0f + scale2[c]) + shift2[c];
    }
  }
}

template <int C, int F>
INLINE void pixel_mlp_fwd_tile(
    const Weights& w, const float* x, const float* e, const float* mod, float* y, const Tile& t, int64_t count) {
  const int64_t c_end = C ? C : w.C, f_end = F ? F : w.F;
  for (int64_t i = 0; i < count; i++) {
    const int64_t at = i * c_end;
    enter<C>(w, x + at, e + at, mod + 4 * at, t.m + at, t.n + at, t.h + at, t.r[i]);
  }
  rows_product<F>(count, f_end, t.h, c_end, 1, w.w1t, c_end, w.b1, 0, t.u);
  if (w.tanh) {
#pragma omp simd
    for (int64_t i = 0; i < count * f_end; i++) t.g[i] = gelu_tanh(t.u[i]);
  } else {
#pragma omp simd
    for (int64_t i = 0; i < count * f_end; i++) t.g[i] = gelu(t.u[i]);
  }
  rows_product<C>(count, c_end, t.g, f_end, 1, w.w2t, f_end, w.b2, 0, t.o);
  for (int64_t i = 0; i < count; i++) {
    const int64_t at = i * c_end;
    const float *RESTRICT m = t.m + at, *RESTRICT o = t.o + at, *RESTRICT mod_i = mod + 4 * at;
    float* RESTRICT out = y + at;
    if (w.post) {
      const float *RESTRICT scale2 = mod_i + 2 * c_end, *RESTRICT shift2 = mod_i + 3 * c_end;
#pragma omp simd
      for (int64_t c = 0; c < c_end; c++) out[c] = m[c] + (1.0f + scale2[c]) * o[c] + shift2[c];
    } else {
      const float* RESTRICT gate2 = mod_i + 3 * c_end;
#pragma omp simd
      for (int64_t c = 0; c < c_end; c++) out[c] = m[c] + gate2[c] * o[c];
    }
  }
}

// Gradients of the weights of a chunk, added to: norm_weight [C], W1^T [C, F], b1 [F], W2 [C, F], b2 [C].
struct Sums {
  float *norm_weight, *w1t, *b1, *w2, *b2;
};

template <int C, int F>
INLINE void pixel_mlp_bwd_tile(
    const Weights& w, const float* dy, const float* x, const float* e, const float* mod, float* dx, float* de,
    float* dmod, const Sums& sums, const Tile& t, float* d_o, float* dh, float* slope, int64_t count) {
  const int64_t c_end = C ? C : w.C, f_end = F ? F : w.F;
  for (int64_t i = 0; i < count; i++) {
    const int64_t at = i * c_end;
    const float *RESTRICT grad = dy + at, *RESTRICT mod_i = mod + 4 * at;
    float *RESTRICT to = d_o + at, *RESTRICT sum = sums.b2;
    enter<C>(w, x + at, e + at, mod_i, t.m + at, t.n + at, t.h + at, t.r[i]);
    if (w.post) {
      const float* RESTRICT scale2 = mod_i + 2 * c_end;
#pragma omp simd
      for (int64_t c = 0; c < c_end; c++) to[c] = grad[c] * (1.0f + scale2[c]);
    } else {
      const float* RESTRICT gate2 = mod_i + 3 * c_end;
#pragma omp simd
      for (int64_t c = 0; c < c_end; c++) to[c] = grad[c] * gate2[c];
    }
#pragma omp simd
    for (int64_t c = 0; c < c_end; c++) sum[c] += to[c];
  }
  // u, then g = gelu(u) and its slope
  rows_product<F>(count, f_end, t.h, c_end, 1, w.w1t, c_end, w.b1, 0, t.u);
  if (w.tanh) {
#pragma omp simd
    for (int64_t i = 0; i < count * f_end; i++) {
      const ValueAndSlope both = gelu_tanh_and_slope(t.u[i]);
      t.g[i] = both.value, slope[i] = both.slope;
    }
  } else {
#pragma omp simd
    for (int64_t i = 0; i < count * f_end; i++) {
      const ValueAndSlope both = gelu_and_slope(t.u[i]);
      t.g[i] = both.value, slope[i] = both.slope;
    }
  }
  // o for the gradient of its factor, dW2, and du = (do W2) * slope in the place of u
  rows_product<C>(count, c_end, t.g, f_end, 1, w.w2t, f_end, w.b2, 0, t.o);
  rows_product<F>(c_end, f_end, d_o, 1, c_end, t.g, count, sums.w2, f_end, sums.w2);
  rows_product<F>(count, f_end, d_o, c_end, 1, w.w2, c_end, nullptr, 0, t.u);
  for (int64_t i = 0; i < count; i++) {
    float *RESTRICT du = t.u + i * f_end, *RESTRICT s = slope + i * f_end, *RESTRICT sum = sums.b1;
#pragma omp simd
    for (int64_t f = 0; f < f_end; f++) {
      du[f] *= s[f];
      sum[f] += du[f];
    }
  }
  // dW1 and dh
  rows_product<F>(c_end, f_end, t.h, 1, c_end, t.u, count, sums.w1t, f_end, sums.w1t);
  rows_product<C>(count, c_end, t.u, f_end, 1, w.w1, f_end, nullptr, 0, dh);
  // through the modulation, the norm and the residual
  for (int64_t i = 0; i < count; i++) {
    const int64_t at = i * c_end;
    const float *RESTRICT grad = dy + at, *RESTRICT n = t.n + at, *RESTRICT o = t.o + at, *RESTRICT dh_i = dh + at,
                *RESTRICT e_i = e + at, *RESTRICT mod_i = mod + 4 * at, *RESTRICT scale2 = mod_i + 2 * c_end;
    float *RESTRICT dx_i = dx + at, *RESTRICT de_i = de + at, *RESTRICT dmod_i = dmod + 4 * at,
          *RESTRICT dscale2 = dmod_i + 2 * c_end, *RESTRICT sum = sums.norm_weight;
    float dot = 0.0f;
#pragma omp simd reduction(+ : dot)
    for (int64_t c = 0; c < c_end; c++) {
      const float factor = w.post ? 1.0f : 1.0f + scale2[c];
      sum[c] += dh_i[c] * factor * n[c];
      dot += dh_i[c] * w.norm_weight[c] * factor * n[c];
    }
    const float mean = dot / c_end, r = t.r[i];
    if (w.post) {
      const float* RESTRICT scale1 = mod_i;
      float *RESTRICT dscale1 = dmod_i, *RESTRICT dshift1 = dmod_i + c_end, *RESTRICT dshift2 = dmod_i + 3 * c_end;
#pragma omp simd
      for (int64_t c = 0; c < c_end; c++) {
        const float dm = grad[c] + r * (dh_i[c] * w.norm_weight[c] - n[c] * mean);
        dx_i[c] = dm;
        de_i[c] = dm * (1.0f + scale1[c]);
        dscale1[c] = dm * e_i[c];
        dshift1[c] = dm;
        dscale2[c] = grad[c] * o[c];
        dshift2[c] = grad[c];
      }
    } else {
      const float* RESTRICT gate1 = mod_i;
      float *RESTRICT dgate1 = dmod_i, *RESTRICT dshift2 = dmod_i + c_end, *RESTRICT dgate2 = dmod_i + 3 * c_end;
#pragma omp simd
      for (int64_t c = 0; c < c_end; c++) {
        const float dm = grad[c] + r * (dh_i[c] * w.norm_weight[c] * (1.0f + scale2[c]) - n[c] * mean);
        dx_i[c] = dm;
        de_i[c] = dm * gate1[c];
        dgate1[c] = dm * e_i[c];
        dshift2[c] = dh_i[c];
        dscale2[c] = dh_i[c] * n[c] * w.norm_weight[c];
        dgate2[c] = grad[c] * o[c];
      }
    }
  }
}

// Space for a tile.
struct Space {
  explicit Space(int64_t C, int64_t F) : memory(TILE * (1 + 6 * C + 3 * F)) {
    tile.u = memory.take(TILE * F), tile.g = memory.take(TILE * F), slope = memory.take(TILE * F);
    tile.n = memory.take(TILE * C), tile.h = memory.take(TILE * C), tile.o = memory.take(TILE * C);
    tile.m = memory.take(TILE * C), d_o = memory.take(TILE * C), dh = memory.take(TILE * C);
    tile.r = memory.take(TILE);
  }
  Scratch memory;
  Tile tile;
  float *slope, *d_o, *dh;
};

template <int C, int F>
INLINE void fwd_tiles(
    const Weights& w, const float* x, const float* e, const float* mod, float* y, Space& space, int64_t pixels) {
  for (int64_t m = 0; m < pixels; m += TILE) {
    const int64_t o = m * w.C;
    pixel_mlp_fwd_tile<C, F>(w, x + o, e + o, mod + 4 * o, y + o, space.tile, std::min(TILE, pixels - m));
  }
}

template <int C, int F>
INLINE void bwd_tiles(
    const Weights& w, const float* dy, const float* x, const float* e, const float* mod, float* dx, float* de,
    float* dmod, const Sums& sums, Space& space, int64_t pixels) {
  for (int64_t m = 0; m < pixels; m += TILE) {
    const int64_t o = m * w.C;
    pixel_mlp_bwd_tile<C, F>(
        w, dy + o, x + o, e + o, mod + 4 * o, dx + o, de + o, dmod + 4 * o, sums, space.tile, space.d_o, space.dh,
        space.slope, std::min(TILE, pixels - m));
  }
}

MULTIVERSION void pixel_mlp_fwd(
    const Weights& w, const float* x, const float* e, const float* mod, float* y, Space& space, int64_t pixels) {
  if (w.C == 8 && w.F == 32) return fwd_tiles<8, 32>(w, x, e, mod, y, space, pixels);
  if (w.C == 16 && w.F == 64) return fwd_tiles<16, 64>(w, x, e, mod, y, space, pixels);
  if (w.C == 32 && w.F == 128) return fwd_tiles<32, 128>(w, x, e, mod, y, space, pixels);
  return fwd_tiles<0, 0>(w, x, e, mod, y, space, pixels);
}

MULTIVERSION void pixel_mlp_bwd(
    const Weights& w, const float* dy, const float* x, const float* e, const float* mod, float* dx, float* de,
    float* dmod, const Sums& sums, Space& space, int64_t pixels) {
  if (w.C == 8 && w.F == 32) return bwd_tiles<8, 32>(w, dy, x, e, mod, dx, de, dmod, sums, space, pixels);
  if (w.C == 16 && w.F == 64) return bwd_tiles<16, 64>(w, dy, x, e, mod, dx, de, dmod, sums, space, pixels);
  if (w.C == 32 && w.F == 128) return bwd_tiles<32, 128>(w, dy, x, e, mod, dx, de, dmod, sums, space, pixels);
  return bwd_tiles<0, 0>(w, dy, x, e, mod, dx, de, dmod, sums, space, pixels);
}

// The weights in float32 and, for the products, transposed; holds the memory that `view` points into.
struct OwnedWeights {
  OwnedWeights(
      const Tensor& norm_weight_, const Tensor& w1_, const Tensor& b1_, const Tensor& w2_, const Tensor& b2_, bool post,
      c10::string_view gelu, double eps)
      : norm_weight(in_float(norm_weight_)), w1(in_float(w1_)), b1(in_float(b1_)), w2(in_float(w2_)), b2(in_float(b2_)),
        w1t(w1.t().contiguous()), w2t(w2.t().contiguous()) {
    view = {
        w1.size(1), w1.size(0), post, gelu == "tanh", static_cast<float>(eps), norm_weight.const_data_ptr<float>(),
        w1.const_data_ptr<float>(), b1.const_data_ptr<float>(), w2.const_data_ptr<float>(), b2.const_data_ptr<float>(),
        w1t.const_data_ptr<float>(), w2t.const_data_ptr<float>()};
  }
  Tensor norm_weight, w1, b1, w2, b2, w1t, w2t;
  Weights view;
};

Tensor pixel_mlp(
    const Tensor& x_, const Tensor& e_, const Tensor& modulation_, const Tensor& norm_weight, const Tensor& w1,
    const Tensor& b1, const Tensor& w2, const Tensor& b2, bool post, c10::string_view gelu, double eps) {
  const OwnedWeights owned(norm_weight, w1, b1, w2, b2, post, gelu, eps);
  const Weights& w = owned.view;
  const Tensor x = in_float(x_), e = in_float(e_), modulation = in_float(modulation_);
  const int64_t M = x.size(0) * x.size(1), C = w.C;
  Tensor y = at::empty_like(x);
  const float *px = x.const_data_ptr<float>(), *pe = e.const_data_ptr<float>(),
              *pm = modulation.const_data_ptr<float>();
  float* py = y.data_ptr<float>();
  for_chunks(M, MLP_PIXELS, 4 * w.F, [&](int64_t, int64_t first, int64_t last) {
    Space space(C, w.F);
    pixel_mlp_fwd(w, px + first * C, pe + first * C, pm + 4 * first * C, py + first * C, space, last - first);
  });
  return y.to(x_.scalar_type());
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> pixel_mlp_backward(
    const Tensor& dy_, const Tensor& x_, const Tensor& e_, const Tensor& modulation_, const Tensor& norm_weight,
    const Tensor& w1, const Tensor& b1, const Tensor& w2, const Tensor& b2, bool post, c10::string_view gelu,
    double eps) {
  const OwnedWeights owned(norm_weight, w1, b1, w2, b2, post, gelu, eps);
  const Weights& w = owned.view;
  const Tensor dy = in_float(dy_), x = in_float(x_), e = in_float(e_), modulation = in_float(modulation_);
  const int64_t M = x.size(0) * x.size(1), C = w.C, F = w.F, size = 2 * C * F + F + 2 * C;
  Tensor dx = at::empty_like(x), de = at::empty_like(e), dmodulation = at::empty_like(modulation);
  Tensor partial = at::zeros({ceil_div(M, MLP_PIXELS), size}, x.options());
  const float *pdy = dy.const_data_ptr<float>(), *px = x.const_data_ptr<float>(), *pe = e.const_data_ptr<float>(),
              *pm = modulation.const_data_ptr<float>();
  float *pdx = dx.data_ptr<float>(), *pde = de.data_ptr<float>(), *pdm = dmodulation.data_ptr<float>(),
        *pp = partial.data_ptr<float>();
  for_chunks(M, MLP_PIXELS, 12 * F, [&](int64_t chunk, int64_t first, int64_t last) {
    Space space(C, F);
    float* p = pp + chunk * size;
    const Sums sums{p + 2 * C * F + F, p, p + 2 * C * F, p + C * F, p + 2 * C * F + F + C};
    const int64_t o = first * C;
    pixel_mlp_bwd(
        w, pdy + o, px + o, pe + o, pm + 4 * o, pdx + o, pde + o, pdm + 4 * o, sums, space, last - first);
  });
  const auto parts = sum_partials(partial).split_with_sizes({C * F, C * F, F, C, C});
  const auto own = [](const Tensor& part, const Tensor& like) { return at::empty_like(like).copy_(part); };
  return {
      dx.to(x_.scalar_type()), de.to(e_.scalar_type()), dmodulation.to(modulation_.scalar_type()),
      own(parts[3], norm_weight), own(parts[0].view({C, F}).t(), w1), own(parts[2], b1),
      own(parts[1].view({C, F}), w2), own(parts[4], b2)};
}

struct PixelMLP : torch::autograd::Function<PixelMLP> {
  static Tensor forward(
      AutogradContext* ctx, const Tensor& x, const Tensor& e, const Tensor& modulation, const Tensor& norm_weight,
      const Tensor& w1, const Tensor& b1, const Tensor& w2, const Tensor& b2, bool post, std::string gelu,
      double eps) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({x, e, modulation, norm_weight, w1, b1, w2, b2});
    ctx->saved_data["post"] = post;
    ctx->saved_data["gelu"] = gelu;
    ctx->saved_data["eps"] = eps;
    static const auto run = op<decltype(pixel_mlp)>("pixelgen::pixel_mlp");
    return run.call(x, e, modulation, norm_weight, w1, b1, w2, b2, post, gelu, eps);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto s = ctx->get_saved_variables();
    const auto& gelu = ctx->saved_data["gelu"].toStringRef();
    static const auto run = op<decltype(pixel_mlp_backward)>("pixelgen::pixel_mlp_backward");
    auto [dx, de, dmodulation, dnorm_weight, dw1, db1, dw2, db2] = run.call(
        grads[0].contiguous(), s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7], ctx->saved_data["post"].toBool(), gelu,
        ctx->saved_data["eps"].toDouble());
    return {dx, de, dmodulation, dnorm_weight, dw1, db1, dw2, db2, Tensor(), Tensor(), Tensor()};
  }
};

Tensor pixel_mlp_autograd(
    const Tensor& x, const Tensor& e, const Tensor& modulation, const Tensor& norm_weight, const Tensor& w1,
    const Tensor& b1, const Tensor& w2, const Tensor& b2, bool post, c10::string_view gelu, double eps) {
  return PixelMLP::apply(x, e, modulation, norm_weight, w1, b1, w2, b2, post, std::string(gelu), eps);
}

TORCH_LIBRARY_IMPL(pixelgen, CPU, m) {
  m.impl("pixel_mlp", pixel_mlp);
  m.impl("pixel_mlp_backward", pixel_mlp_backward);
}
TORCH_LIBRARY_IMPL(pixelgen, AutogradCPU, m) {
  m.impl("pixel_mlp", pixel_mlp_autograd);
  m.impl("pixel_mlp_backward", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace
}  // namespace pixelgen
