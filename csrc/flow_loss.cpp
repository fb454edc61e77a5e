// The end of the pixel head and its loss: RMSNorm, projection of every pixel to 3 channels, squared error per image.
//
//     prediction = W (n * norm_weight) + b,   n = x r,   r = 1 / sqrt(mean_C(x^2) + eps)
//     loss_i     = weight_i mean_{L, P, 3} (prediction - target)^2          over the pixels of image i
//
//     d  = 2 dloss_i weight_i / (3 L P) (prediction - target)               [N, P, 3], never in memory
//     u  = norm_weight * (d W),   dx = r (u - n mean_C(u n))
//     S  = sum_pixels d^T n,   dW = S * norm_weight,   dnorm_weight = sum_3 W * S,   db = sum_pixels d
//
// Rows of W times norm_weight are made once. A chunk of pixels of one image has its partial sums. Twin of flow_loss.py.
// Shapes: x [N, P, C] with N = B L; norm_weight [C]; W [3, C]; b [3]; target [N, P, 3]; weight, loss float32 [B].
#include "operator.h"

namespace pixelgen {
namespace {

constexpr int64_t LOSS_PIXELS = 512;  // of a chunk

// Three channels of prediction - target of one pixel; w is W * norm_weight.
INLINE void pixel_error(
    const float* RESTRICT x, const float* RESTRICT w, const float* RESTRICT b, const float* RESTRICT target, float eps,
    int64_t C, float& r, float error[3]) {
  float square = 0.0f, p0 = 0.0f, p1 = 0.0f, p2 = 0.0f;
#pragma omp simd reduction(+ : square, p0, p1, p2)
  for (int64_t c = 0; c < C; c++) {
    square += x[c] * x[c];
    p0 += x[c] * w[c];
    p1 += x[c] * w[C + c];
    p2 += x[c] * w[2 * C + c];
  }
  r = 1.0f / std::sqrt(square / C + eps);
  error[0] = p0 * r + b[0] - target[0];
  error[1] = p1 * r + b[1] - target[1];
  error[2] = p2 * r + b[2] - target[2];
}

template <int CHANNELS>
INLINE float flow_loss_fwd_pixels(
    const float* RESTRICT x, const float* RESTRICT w, const float* RESTRICT b, const float* RESTRICT target,
    int64_t pixels, int64_t channels, float eps) {
  const int64_t C = CHANNELS ? CHANNELS : channels;
  float total = 0.0f;
  for (int64_t m = 0; m < pixels; m++, x += C, target += 3) {
    float r, e[3];
    pixel_error(x, w, b, target, eps, C, r, e);
    total += e[0] * e[0] + e[1] * e[1] + e[2] * e[2];
  }
  return total;
}

// s [3, C] and db [3] are added to.
template <int CHANNELS>
INLINE void flow_loss_bwd_pixels(
    float factor, const float* RESTRICT x, const float* RESTRICT w, const float* RESTRICT b,
    const float* RESTRICT target, float* RESTRICT dx, float* RESTRICT s, float* RESTRICT db, int64_t pixels,
    int64_t channels, float eps) {
  const int64_t C = CHANNELS ? CHANNELS : channels;
  for (int64_t m = 0; m < pixels; m++, x += C, dx += C, target += 3) {
    float r, e[3];
    pixel_error(x, w, b, target, eps, C, r, e);
    const float d0 = factor * e[0], d1 = factor * e[1], d2 = factor * e[2];
    db[0] += d0, db[1] += d1, db[2] += d2;
    float dot = 0.0f;
#pragma omp simd reduction(+ : dot)
    for (int64_t c = 0; c < C; c++) {
      const float n = x[c] * r, u = d0 * w[c] + d1 * w[C + c] + d2 * w[2 * C + c];
      s[c] += d0 * n;
      s[C + c] += d1 * n;
      s[2 * C + c] += d2 * n;
      dot += u * n;
    }
    const float mean = dot / C;
#pragma omp simd
    for (int64_t c = 0; c < C; c++) {
      const float u = d0 * w[c] + d1 * w[C + c] + d2 * w[2 * C + c];
      dx[c] = r * (u - x[c] * r * mean);
    }
  }
}

MULTIVERSION float flow_loss_fwd(
    const float* x, const float* w, const float* b, const float* target, int64_t pixels, int64_t C, float eps) {
  switch (C) {
    case 8: return flow_loss_fwd_pixels<8>(x, w, b, target, pixels, C, eps);
    case 16: return flow_loss_fwd_pixels<16>(x, w, b, target, pixels, C, eps);
    case 32: return flow_loss_fwd_pixels<32>(x, w, b, target, pixels, C, eps);
    default: return flow_loss_fwd_pixels<0>(x, w, b, target, pixels, C, eps);
  }
}

MULTIVERSION void flow_loss_bwd(
    float factor, const float* x, const float* w, const float* b, const float* target, float* dx, float* s, float* db,
    int64_t pixels, int64_t C, float eps) {
  switch (C) {
    case 8: return flow_loss_bwd_pixels<8>(factor, x, w, b, target, dx, s, db, pixels, C, eps);
    case 16: return flow_loss_bwd_pixels<16>(factor, x, w, b, target, dx, s, db, pixels, C, eps);
    case 32: return flow_loss_bwd_pixels<32>(factor, x, w, b, target, dx, s, db, pixels, C, eps);
    default: return flow_loss_bwd_pixels<0>(factor, x, w, b, target, dx, s, db, pixels, C, eps);
  }
}

Tensor flow_loss(
    const Tensor& x_, const Tensor& norm_weight_, const Tensor& w_, const Tensor& b_, const Tensor& target_,
    const Tensor& weight_, double eps) {
  const Tensor x = in_float(x_), b = in_float(b_), target = in_float(target_), weight = in_float(weight_),
               w = in_float(w_.to(at::kFloat) * norm_weight_.to(at::kFloat));
  const int64_t B = weight.size(0), C = x.size(2), pixels = B ? x.size(0) / B * x.size(1) : 0;
  const int64_t chunks = ceil_div(pixels, LOSS_PIXELS);
  Tensor partial = at::empty({B, chunks}, x.options());
  const float *px = x.const_data_ptr<float>(), *pw = w.const_data_ptr<float>(), *pb = b.const_data_ptr<float>(),
              *pt = target.const_data_ptr<float>();
  float* pp = partial.data_ptr<float>();
  for_chunks(B * chunks, 1, LOSS_PIXELS * C, [&](int64_t n, int64_t, int64_t) {
    const int64_t start = n % chunks * LOSS_PIXELS, first = n / chunks * pixels + start;
    pp[n] = flow_loss_fwd(
        px + first * C, pw, pb, pt + first * 3, std::min(LOSS_PIXELS, pixels - start), C, eps);
  });
  return partial.sum(1) * weight / (3 * pixels);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> flow_loss_backward(
    const Tensor& dloss, const Tensor& x_, const Tensor& norm_weight_, const Tensor& w_, const Tensor& b_,
    const Tensor& target_, const Tensor& weight_, double eps) {
  const Tensor norm_weight = in_float(norm_weight_), plain = in_float(w_);
  const Tensor x = in_float(x_), b = in_float(b_), target = in_float(target_), w = plain * norm_weight;
  const int64_t B = weight_.size(0), C = x.size(2), pixels = B ? x.size(0) / B * x.size(1) : 0;
  const int64_t chunks = ceil_div(pixels, LOSS_PIXELS);
  const Tensor factor = in_float(dloss * weight_ * (2.0 / std::max<int64_t>(3 * pixels, 1)));
  Tensor dx = at::empty_like(x), partial = at::zeros({B * chunks, 3 * C + 3}, x.options());
  const float *px = x.const_data_ptr<float>(), *pw = w.const_data_ptr<float>(), *pb = b.const_data_ptr<float>(),
              *pt = target.const_data_ptr<float>(), *pf = factor.const_data_ptr<float>();
  float *pdx = dx.data_ptr<float>(), *pp = partial.data_ptr<float>();
  for_chunks(B * chunks, 1, 2 * LOSS_PIXELS * C, [&](int64_t n, int64_t, int64_t) {
    const int64_t start = n % chunks * LOSS_PIXELS, first = n / chunks * pixels + start;
    float* s = pp + n * (3 * C + 3);
    flow_loss_bwd(
        pf[n / chunks], px + first * C, pw, pb, pt + first * 3, pdx + first * C, s, s + 3 * C,
        std::min(LOSS_PIXELS, pixels - start), C, eps);
  });
  const Tensor total = sum_partials(partial), s = total.slice(0, 0, 3 * C).view({3, C});
  return {
      dx.to(x_.scalar_type()), (plain * s).sum(0).to(norm_weight_.scalar_type()),
      (norm_weight * s).to(w_.scalar_type()), total.slice(0, 3 * C).clone().to(b_.scalar_type())};
}

struct FlowLoss : torch::autograd::Function<FlowLoss> {
  static Tensor forward(
      AutogradContext* ctx, const Tensor& x, const Tensor& norm_weight, const Tensor& w, const Tensor& b,
      const Tensor& target, const Tensor& weight, double eps) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({x, norm_weight, w, b, target, weight});
    ctx->saved_data["eps"] = eps;
    static const auto run = op<decltype(flow_loss)>("pixelgen::flow_loss");
    return run.call(x, norm_weight, w, b, target, weight, eps);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto s = ctx->get_saved_variables();
    static const auto run = op<decltype(flow_loss_backward)>("pixelgen::flow_loss_backward");
    auto [dx, dnorm_weight, dw, db] =
        run.call(grads[0], s[0], s[1], s[2], s[3], s[4], s[5], ctx->saved_data["eps"].toDouble());
    return {dx, dnorm_weight, dw, db, Tensor(), Tensor(), Tensor()};
  }
};

Tensor flow_loss_autograd(
    const Tensor& x, const Tensor& norm_weight, const Tensor& w, const Tensor& b, const Tensor& target,
    const Tensor& weight, double eps) {
  return FlowLoss::apply(x, norm_weight, w, b, target, weight, eps);
}

TORCH_LIBRARY_IMPL(pixelgen, CPU, m) {
  m.impl("flow_loss", flow_loss);
  m.impl("flow_loss_backward", flow_loss_backward);
}
TORCH_LIBRARY_IMPL(pixelgen, AutogradCPU, m) {
  m.impl("flow_loss", flow_loss_autograd);
  m.impl("flow_loss_backward", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace
}  // namespace pixelgen
