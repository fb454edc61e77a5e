// Layers with one autograd node each, for CPU tensors: what the host does between their operators falls away.
//
//     attention_layer   q, k, v = qk_norm_rope(x W_qkv^T),   out = attention(q, k, v) W_o^T + b_o
//     swiglu_layer      (a | b) = x W_13^T,                  out = (silu(a) * b) W_2^T
//
// They are made of the operators and of PyTorch's products, called through the dispatcher, so that whoever counts or
// profiles sees each; forward keeps what autograd would keep of the same operators, and the results are the same bits.
// Twin of layers.py. Shapes: x [B, L, D]; W_qkv [3 H d, D]; norm weights [d]; W_o [D', H d]; cos, sin [L, d / 2];
// W_13 [2 F, D]; W_2 [D', F].
#include "operator.h"

namespace pixelgen {
namespace {

using Two = std::tuple<Tensor, Tensor>;
using Three = std::tuple<Tensor, Tensor, Tensor>;
using Norm = Two(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, int64_t, double);
using NormBackward = Two(
    const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
    const Tensor&, double);
using Mix = Two(const Tensor&, const Tensor&, const Tensor&);
using MixBackward = Three(
    const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&);
using Gate = Tensor(const Tensor&);
using GateBackward = Two(const Tensor&, const Tensor&);

Tensor rows(const Tensor& x) { return x.flatten(0, -2); }

// x with its last dimension replaced by what the rows of a product have.
Tensor like_rows(const Tensor& product, const Tensor& x) {
  auto shape = x.sizes().vec();
  shape.back() = product.size(-1);
  return product.view(shape);
}

// The gradient of a weight [N, K] whose product of x [T, K] has the gradient dy [T, N]; undefined where none is wanted.
Tensor weight_gradient(AutogradContext* ctx, size_t input, const Tensor& dy, const Tensor& x) {
  return ctx->needs_input_grad(input) ? at::mm(dy.t(), x) : Tensor();
}

struct AttentionLayer : torch::autograd::Function<AttentionLayer> {
  static Tensor forward(
      AutogradContext* ctx, const Tensor& x, const Tensor& qkv_weight, const Tensor& q_norm_weight,
      const Tensor& k_norm_weight, const Tensor& proj_weight, const OptionalTensor& proj_bias, const Tensor& cos,
      const Tensor& sin, int64_t heads, double eps) {
    at::AutoDispatchBelowADInplaceOrView guard;
    static const auto norm = op<Norm>("pixelgen::qk_norm_rope");
    static const auto mix = op<Mix>("pixelgen_native::attention");
    const Tensor qkv = like_rows(at::mm(rows(x), qkv_weight.t()), x);
    const auto [q, k] = norm.call(qkv, q_norm_weight, k_norm_weight, cos, sin, heads, eps);
    const Tensor v = qkv.view({q.size(0), q.size(1), 3, heads, q.size(3)}).select(2, 2);
    const auto [mixed, lse] = mix.call(q, k, v);
    const Tensor tokens = mixed.view({-1, heads * q.size(3)});
    const Tensor out = proj_bias ? at::addmm(*proj_bias, tokens, proj_weight.t()) : at::mm(tokens, proj_weight.t());
    ctx->save_for_backward(
        {x, qkv_weight, q_norm_weight, k_norm_weight, proj_weight, cos, sin, qkv, q, k, mixed, lse});
    ctx->saved_data["eps"] = eps;
    ctx->saved_data["bias"] = proj_bias.has_value();
    return like_rows(out, x);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto norm = op<NormBackward>("pixelgen::qk_norm_rope_backward");
    static const auto mix = op<MixBackward>("pixelgen_native::attention_backward");
    const auto s = ctx->get_saved_variables();
    const Tensor &x = s[0], &qkv_weight = s[1], &proj_weight = s[4], &qkv = s[7], &q = s[8], &k = s[9], &mixed = s[10];
    const Tensor v = qkv.view({q.size(0), q.size(1), 3, q.size(2), q.size(3)}).select(2, 2);
    const Tensor dout = rows(grads[0].contiguous());
    const Tensor dmixed = at::mm(dout, proj_weight).view(mixed.sizes());
    const auto [dq, dk, dv] = mix.call(dmixed, q, k, v, mixed, s[11]);
    const auto [packed, dnorm] = norm.call(dq, dk, dv, qkv, s[2], s[3], s[5], s[6], ctx->saved_data["eps"].toDouble());
    const Tensor dqkv = rows(packed);
    const Tensor dx = ctx->needs_input_grad(0) ? at::mm(dqkv, qkv_weight).view(x.sizes()) : Tensor();
    const bool bias = ctx->saved_data["bias"].toBool() && ctx->needs_input_grad(5);
    return {
        dx, weight_gradient(ctx, 1, dqkv, rows(x)), dnorm[0], dnorm[1],
        weight_gradient(ctx, 4, dout, mixed.view({-1, mixed.size(2) * mixed.size(3)})),
        bias ? dout.sum(0) : Tensor(), Tensor(), Tensor(), Tensor(), Tensor()};
  }
};

struct SwiGLULayer : torch::autograd::Function<SwiGLULayer> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& w13, const Tensor& w2) {
    at::AutoDispatchBelowADInplaceOrView guard;
    static const auto gate = op<Gate>("pixelgen::swiglu");
    const Tensor packed = at::mm(rows(x), w13.t());
    ctx->save_for_backward({x, w13, w2, packed});
    return like_rows(at::mm(gate.call(packed), w2.t()), x);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto gate = op<GateBackward>("pixelgen::swiglu_backward");
    const auto s = ctx->get_saved_variables();
    const Tensor &x = s[0], &w13 = s[1], &w2 = s[2], dout = rows(grads[0].contiguous());
    const auto [dpacked, y] = gate.call(at::mm(dout, w2), s[3]);
    const Tensor dx = ctx->needs_input_grad(0) ? at::mm(dpacked, w13).view(x.sizes()) : Tensor();
    return {dx, weight_gradient(ctx, 1, dpacked, rows(x)), weight_gradient(ctx, 2, dout, y)};
  }
};

Tensor attention_layer(
    const Tensor& x, const Tensor& qkv_weight, const Tensor& q_norm_weight, const Tensor& k_norm_weight,
    const Tensor& proj_weight, const OptionalTensor& proj_bias, const Tensor& cos, const Tensor& sin, int64_t heads,
    double eps) {
  return AttentionLayer::apply(
      x, qkv_weight, q_norm_weight, k_norm_weight, proj_weight, proj_bias, cos, sin, heads, eps);
}

Tensor swiglu_layer(const Tensor& x, const Tensor& w13, const Tensor& w2) { return SwiGLULayer::apply(x, w13, w2); }

TORCH_LIBRARY_IMPL(pixelgen_native, CompositeImplicitAutograd, m) {
  m.impl("attention_layer", attention_layer);
  m.impl("swiglu_layer", swiglu_layer);
}

}  // namespace
}  // namespace pixelgen
