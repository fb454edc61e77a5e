// Residual, RMSNorm and adaptive modulation of the token stream, in one operator.
//
//     x' = x + gate * branch                                  (when a branch is pending)
//     y  = n * norm_weight * (1 + scale) + shift              n = x' r,  r = 1 / sqrt(mean(x'^2) + eps)
//
//     u       = dy * norm_weight * (1 + scale)
//     dx      = dx' + r (u - n mean(u n)),    dbranch = dx * gate,    dgate = sum_L dx * branch
//     dshift  = sum_L dy,    dscale = norm_weight * sum_L dy n,    dnorm_weight = sum_B (1 + scale) sum_L dy n
//
// A task takes images, so that the sums over tokens need no exchange; that over images has one partial an image.
// Twin of norm_modulate.py. Shapes: x, x', branch, y [B, L, D]; norm_weight [D]; shift, scale, gate [B, D]; r [B, L].
#include "operator.h"

namespace pixelgen {
namespace {

MULTIVERSION void norm_modulate_fwd(
    const float* RESTRICT x, const float* RESTRICT norm_weight, const float* RESTRICT shift,
    const float* RESTRICT scale, const float* RESTRICT branch, const float* RESTRICT gate, float* RESTRICT y,
    float* RESTRICT xp, float* RESTRICT r_out, int64_t L, int64_t D, float eps) {
  for (int64_t l = 0; l < L; l++, x += D, y += D) {
    float square = 0.0f;
    if (branch) {
#pragma omp simd reduction(+ : square)
      for (int64_t d = 0; d < D; d++) {
        const float v = x[d] + gate[d] * branch[d];
        xp[d] = v;
        square += v * v;
      }
    } else {
#pragma omp simd reduction(+ : square)
      for (int64_t d = 0; d < D; d++) square += x[d] * x[d];
    }
    const float r = 1.0f / std::sqrt(square / D + eps);
    r_out[l] = r;
    const float* RESTRICT v = branch ? xp : x;
#pragma omp simd
    for (int64_t d = 0; d < D; d++) y[d] = v[d] * r * norm_weight[d] * (1.0f + scale[d]) + shift[d];
    if (branch) branch += D, xp += D;
  }
}

// One image. sum_dyn [D] receives sum_L dy n, which the caller turns into dscale and dnorm_weight.
MULTIVERSION void norm_modulate_bwd(
    const float* RESTRICT dy, const float* RESTRICT dxp, const float* RESTRICT xp, const float* RESTRICT r_in,
    const float* RESTRICT norm_weight, const float* RESTRICT scale, const float* RESTRICT branch,
    const float* RESTRICT gate, float* RESTRICT dx, float* RESTRICT dbranch, float* RESTRICT sum_dy,
    float* RESTRICT sum_dyn, float* RESTRICT dgate, int64_t L, int64_t D) {
#pragma omp simd
  for (int64_t d = 0; d < D; d++) sum_dy[d] = sum_dyn[d] = 0.0f;
  if (dgate) std::fill(dgate, dgate + D, 0.0f);
  for (int64_t l = 0; l < L; l++, dy += D, xp += D, dx += D) {
    const float r = r_in[l];
    float dot = 0.0f;
#pragma omp simd reduction(+ : dot)
    for (int64_t d = 0; d < D; d++) {
      const float dyn = dy[d] * xp[d] * r;
      sum_dy[d] += dy[d];
      sum_dyn[d] += dyn;
      dot += dyn * norm_weight[d] * (1.0f + scale[d]);
    }
    const float mean = dot / D;
#pragma omp simd
    for (int64_t d = 0; d < D; d++) {
      dx[d] = (dxp ? dxp[d] : 0.0f) + r * (dy[d] * norm_weight[d] * (1.0f + scale[d]) - xp[d] * r * mean);
    }
    if (branch) {
#pragma omp simd
      for (int64_t d = 0; d < D; d++) {
        dbranch[d] = dx[d] * gate[d];
        dgate[d] += dx[d] * branch[d];
      }
      branch += D, dbranch += D;
    }
    if (dxp) dxp += D;
  }
}

std::tuple<Tensor, Tensor, Tensor> norm_modulate(
    const Tensor& x_, const Tensor& norm_weight_, const Tensor& shift_, const Tensor& scale_,
    const OptionalTensor& branch_, const OptionalTensor& gate_, double eps) {
  const Tensor x = in_float(x_), norm_weight = in_float(norm_weight_), shift = rows_in_float(shift_),
               scale = rows_in_float(scale_);
  const bool pending = branch_.has_value();
  const Tensor branch = pending ? in_float(*branch_) : Tensor(), gate = pending ? rows_in_float(*gate_) : Tensor();
  const int64_t B = x.size(0), L = x.size(1), D = x.size(2);
  Tensor y = at::empty_like(x), xp = pending ? at::empty_like(x) : at::empty({0}, x.options());
  Tensor r = at::empty({B, L}, x.options());
  const float *px = x.data_ptr<float>(), *pw = norm_weight.data_ptr<float>(), *pshift = shift.data_ptr<float>(),
              *pscale = scale.data_ptr<float>(), *pb = pending ? branch.data_ptr<float>() : nullptr,
              *pg = pending ? gate.data_ptr<float>() : nullptr;
  float *py = y.data_ptr<float>(), *pxp = xp.data_ptr<float>(), *pr = r.data_ptr<float>();
  for_chunks(B, 1, L * D, [&](int64_t b, int64_t, int64_t) {
    const int64_t o = b * L * D;
    norm_modulate_fwd(
        px + o, pw, pshift + b * shift.stride(0), pscale + b * scale.stride(0), pending ? pb + o : nullptr,
        pending ? pg + b * gate.stride(0) : nullptr, py + o, pending ? pxp + o : nullptr, pr + b * L, L, D, eps);
  });
  const auto dtype = x_.scalar_type();
  return {y.to(dtype), xp.to(dtype), r};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> norm_modulate_backward(
    const Tensor& dy_, const OptionalTensor& dxp_, const Tensor& xp_, const Tensor& r, const Tensor& norm_weight_,
    const Tensor& scale_, const OptionalTensor& branch_, const OptionalTensor& gate_) {
  const Tensor dy = in_float(dy_), xp = in_float(xp_), norm_weight = in_float(norm_weight_),
               scale = rows_in_float(scale_);
  const bool pending = branch_.has_value();
  const Tensor dxp = dxp_ ? in_float(*dxp_) : Tensor();
  const Tensor branch = pending ? in_float(*branch_) : Tensor(), gate = pending ? rows_in_float(*gate_) : Tensor();
  const int64_t B = xp.size(0), L = xp.size(1), D = xp.size(2);
  const auto options = xp.options();
  Tensor dx = at::empty_like(xp), dbranch = pending ? at::empty_like(xp) : at::empty({0}, options);
  Tensor dshift = at::empty({B, D}, options), dscale = at::empty({B, D}, options);
  Tensor dnorm_weight = at::zeros({D}, options), dgate = pending ? at::empty({B, D}, options) : at::empty({0}, options);
  const float *pdy = dy.data_ptr<float>(), *pdxp = dxp.defined() ? dxp.data_ptr<float>() : nullptr,
              *pxp = xp.data_ptr<float>(), *pr = r.data_ptr<float>(), *pw = norm_weight.data_ptr<float>(),
              *pscale = scale.data_ptr<float>(), *pb = pending ? branch.data_ptr<float>() : nullptr,
              *pg = pending ? gate.data_ptr<float>() : nullptr;
  float *pdx = dx.data_ptr<float>(), *pdb = dbranch.data_ptr<float>(), *pds = dshift.data_ptr<float>(),
        *psum = dscale.data_ptr<float>(), *pdg = dgate.data_ptr<float>(), *pdw = dnorm_weight.data_ptr<float>();
  for_chunks(B, 1, L * D, [&](int64_t b, int64_t, int64_t) {
    const int64_t o = b * L * D;
    norm_modulate_bwd(
        pdy + o, pdxp ? pdxp + o : nullptr, pxp + o, pr + b * L, pw, pscale + b * scale.stride(0),
        pending ? pb + o : nullptr, pending ? pg + b * gate.stride(0) : nullptr, pdx + o, pending ? pdb + o : nullptr,
        pds + b * D, psum + b * D, pending ? pdg + b * D : nullptr, L, D);
  });
  for (int64_t b = 0; b < B; b++) {
    const float* RESTRICT s = pscale + b * scale.stride(0);
    float* RESTRICT sum_dyn = psum + b * D;
#pragma omp simd
    for (int64_t d = 0; d < D; d++) {
      pdw[d] += (1.0f + s[d]) * sum_dyn[d];
      sum_dyn[d] *= pw[d];
    }
  }
  const auto stream = xp_.scalar_type(), modulation = scale_.scalar_type();
  return {
      dx.to(stream), dbranch.to(pending ? branch_->scalar_type() : stream), dnorm_weight.to(norm_weight_.scalar_type()),
      dshift.to(modulation), dscale.to(modulation), dgate.to(modulation)};
}

struct NormModulate : torch::autograd::Function<NormModulate> {
  static variable_list forward(
      AutogradContext* ctx, const Tensor& x, const Tensor& norm_weight, const Tensor& shift, const Tensor& scale,
      const OptionalTensor& branch, const OptionalTensor& gate, double eps) {
    at::AutoDispatchBelowADInplaceOrView guard;
    static const auto run = op<decltype(norm_modulate)>("pixelgen::norm_modulate");
    auto [y, xp, r] = run.call(x, norm_weight, shift, scale, branch, gate, eps);
    const auto none = Tensor();
    ctx->save_for_backward({branch ? xp : x, r, norm_weight, scale, branch.value_or(none), gate.value_or(none)});
    ctx->set_materialize_grads(false);
    ctx->mark_non_differentiable({r});
    return {y, xp, r};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const Tensor &xp = saved[0], &r = saved[1], &norm_weight = saved[2], &scale = saved[3];
    const bool pending = saved[4].defined();
    const auto branch = pending ? OptionalTensor(saved[4]) : std::nullopt;
    const auto gate = pending ? OptionalTensor(saved[5]) : std::nullopt;
    const auto dxp = pending && grads[1].defined() ? OptionalTensor(grads[1].contiguous()) : std::nullopt;
    static const auto run = op<decltype(norm_modulate_backward)>("pixelgen::norm_modulate_backward");
    auto [dx, dbranch, dnorm_weight, dshift, dscale, dgate] =
        run.call(contiguous_or_zeros(grads[0], xp), dxp, xp, r, norm_weight, scale, branch, gate);
    if (!pending) return {dx, dnorm_weight, dshift, dscale, Tensor(), Tensor(), Tensor()};
    return {dx, dnorm_weight, dshift, dscale, dbranch, dgate, Tensor()};
  }
};

std::tuple<Tensor, Tensor, Tensor> norm_modulate_autograd(
    const Tensor& x, const Tensor& norm_weight, const Tensor& shift, const Tensor& scale, const OptionalTensor& branch,
    const OptionalTensor& gate, double eps) {
  const auto out = NormModulate::apply(x, norm_weight, shift, scale, branch, gate, eps);
  return {out[0], out[1], out[2]};
}

TORCH_LIBRARY_IMPL(pixelgen, CPU, m) {
  m.impl("norm_modulate", norm_modulate);
  m.impl("norm_modulate_backward", norm_modulate_backward);
}
TORCH_LIBRARY_IMPL(pixelgen, AutogradCPU, m) {
  m.impl("norm_modulate", norm_modulate_autograd);
  m.impl("norm_modulate_backward", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace
}  // namespace pixelgen
