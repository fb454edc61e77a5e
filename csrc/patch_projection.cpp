// Images as patch tokens and as patch-major pixels, noised on the way.
//
//     z = t x + (1-t) s e        target = x - s e        x = image / 127.5 - 1,  e Philox noise of (seed, image number)
//     pixels[b, l, p] = z[b, :, row, column]             l, p row-major over patches and over the pixels inside one
//     tokens[b, l]    = W z_patch + bias                 with the features of a patch ordered (channel, row, column)
//
//     dW = dtokens^T features,   dbias = sum dtokens     image, noise and pixels get no gradient
//
// One loop draws the noise of a row of an image and writes z in both orders and the target; the products are the
// library's. Twin of patch_projection.py. Shapes: image uint8 [B, H, W, 3] or float [B, 3, H, W]; features [B, L, 3 P];
// tokens [B, L, D]; pixels, target [B, L, P, 3]; W [D, 3 P]; bias [D]; numbers int64 [B]; t [B].
#include "operator.h"
#include "philox.h"

namespace pixelgen {
namespace {

// Normal numbers 4 quad .. 4 (quad + count) - 1 of an image.
MULTIVERSION void draw_noise(
    uint64_t seed, uint64_t number, uint32_t quad, int64_t count, float* RESTRICT a, float* RESTRICT b,
    float* RESTRICT c, float* RESTRICT d) {
  const uint32_t low = static_cast<uint32_t>(number), high = static_cast<uint32_t>(number >> 32);
#pragma omp simd
  for (int64_t i = 0; i < count; i++) {
    const Words w = philox4x32(seed, quad + static_cast<uint32_t>(i), low, high, STREAM_NOISE);
    box_muller(w.w0, w.w1, a[i], b[i]);
    box_muller(w.w2, w.w3, c[i], d[i]);
  }
}

struct Geometry {
  int64_t H, W, patch;
  float t, noise_scale;
};

// Row y of one image. x, e: its pixels and their noise [3][W].
// Outputs are those of the image.
MULTIVERSION void noise_row(
    const Geometry& g, int64_t y, const float* RESTRICT x, const float* RESTRICT e, float* RESTRICT features,
    float* RESTRICT pixels, float* RESTRICT target) {
  const int64_t p = g.patch, P = p * p, first = y / p * (g.W / p), inside = y % p * p;
  const float t = g.t, s = g.noise_scale, rest = (1.0f - t) * s;
  for (int64_t l = 0; l < g.W / p; l++) {
    float* RESTRICT to_features = features + (first + l) * 3 * P + inside;
    float* RESTRICT to_pixels = pixels + ((first + l) * P + inside) * 3;
    float* RESTRICT to_target = target + ((first + l) * P + inside) * 3;
    for (int64_t c = 0; c < 3; c++) {
      const float *RESTRICT x_c = x + c * g.W + l * p, *RESTRICT e_c = e + c * g.W + l * p;
      for (int64_t q = 0; q < p; q++) {
        const float z = t * x_c[q] + rest * e_c[q];
        to_features[c * P + q] = z;
        to_pixels[q * 3 + c] = z;
        to_target[q * 3 + c] = x_c[q] - s * e_c[q];
      }
    }
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> noised_patch_projection(
    const Tensor& image, const Tensor& numbers, const Tensor& t_, const Tensor& weight_, const Tensor& bias_,
    int64_t patch, int64_t seed, double noise_scale) {
  const bool bytes = image.scalar_type() == at::kByte;
  const Tensor source = bytes ? image.contiguous() : in_float(image);
  const Tensor t = in_float(t_), n = numbers.contiguous(), weight = in_float(weight_), bias = in_float(bias_);
  const int64_t B = image.size(0), H = image.size(bytes ? 1 : 2), W = image.size(bytes ? 2 : 3);
  const int64_t P = patch * patch, L = H * W / P, D = weight.size(0);
  const auto options = weight.options();
  Tensor features = at::empty({B, L, 3 * P}, options), pixels = at::empty({B, L, P, 3}, options),
         target = at::empty({B, L, P, 3}, options);
  float *pf = features.data_ptr<float>(), *pp = pixels.data_ptr<float>(), *pt = target.data_ptr<float>();
  const uint8_t* from_bytes = bytes ? source.const_data_ptr<uint8_t>() : nullptr;
  const float *from_floats = bytes ? nullptr : source.const_data_ptr<float>(), *times = t.const_data_ptr<float>();
  const int64_t* image_numbers = n.const_data_ptr<int64_t>();
  for_chunks(B * H, patch, 30 * W, [&](int64_t, int64_t first, int64_t last) {
    std::vector<float> x(3 * W), e(3 * W), quads(W);
    for (int64_t row = first; row < last; row++) {
      const int64_t b = row / H, y = row % H, groups = W / 4;
      for (int64_t c = 0; c < 3; c++) {
        draw_noise(
            static_cast<uint64_t>(seed), static_cast<uint64_t>(image_numbers[b]),
            static_cast<uint32_t>((c * H + y) * groups), groups, quads.data(), quads.data() + groups,
            quads.data() + 2 * groups, quads.data() + 3 * groups);
        for (int64_t i = 0; i < W; i++) e[c * W + i] = quads[i % 4 * groups + i / 4];
        for (int64_t i = 0; i < W; i++) {
          x[c * W + i] =
              bytes ? from_bytes[(row * W + i) * 3 + c] / 127.5f - 1.0f : from_floats[((b * 3 + c) * H + y) * W + i];
        }
      }
      noise_row(
          {H, W, patch, times[b], static_cast<float>(noise_scale)}, y, x.data(), e.data(), pf + b * L * 3 * P,
          pp + b * L * P * 3, pt + b * L * P * 3);
    }
  });
  const auto dtype = weight_.scalar_type();
  const Tensor tokens = at::addmm(bias, features.view({B * L, 3 * P}), weight.t()).view({B, L, D});
  return {tokens.to(dtype), pixels.to(dtype), target, features.to(dtype)};
}

// dW | dbias in one tensor [D K + D].
Tensor noised_patch_projection_backward(
    const Tensor& dtokens_, const Tensor& features_, const Tensor& weight, const Tensor& bias) {
  const Tensor dtokens = in_float(dtokens_).flatten(0, 1), features = in_float(features_).flatten(0, 1);
  const int64_t D = weight.size(0), K = weight.size(1);
  Tensor packed = at::empty({D * K + D}, dtokens.options());
  Tensor dweight = packed.slice(0, 0, D * K).view({D, K}), dbias = packed.slice(0, D * K);
  at::mm_out(dweight, dtokens.t(), features);
  at::sum_out(dbias, dtokens, 0);
  return packed.to(weight.scalar_type() == bias.scalar_type() ? weight.scalar_type() : at::kFloat);
}

struct NoisedPatchProjection : torch::autograd::Function<NoisedPatchProjection> {
  static variable_list forward(
      AutogradContext* ctx, const Tensor& image, const Tensor& numbers, const Tensor& t, const Tensor& weight,
      const Tensor& bias, int64_t patch, int64_t seed, double noise_scale) {
    at::AutoDispatchBelowADInplaceOrView guard;
    static const auto run = op<decltype(noised_patch_projection)>("pixelgen::noised_patch_projection");
    auto [tokens, pixels, target, features] = run.call(image, numbers, t, weight, bias, patch, seed, noise_scale);
    ctx->save_for_backward({features, weight, bias});
    ctx->set_materialize_grads(false);
    ctx->mark_non_differentiable({pixels, target, features});
    return {tokens, pixels, target, features};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const Tensor none;
    if (!grads[0].defined()) return {none, none, none, none, none, none, none, none};
    const auto saved = ctx->get_saved_variables();
    const Tensor &weight = saved[1], &bias = saved[2];
    static const auto run =
        op<decltype(noised_patch_projection_backward)>("pixelgen::noised_patch_projection_backward");
    const Tensor packed = run.call(grads[0].contiguous(), saved[0], weight, bias);
    const auto parts = packed.split_with_sizes({weight.numel(), bias.numel()});
    const Tensor dweight = parts[0].view_as(weight).to(weight.scalar_type()), dbias = parts[1].to(bias.scalar_type());
    return {none, none, none, dweight, dbias, none, none, none};
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> noised_patch_projection_autograd(
    const Tensor& image, const Tensor& numbers, const Tensor& t, const Tensor& weight, const Tensor& bias,
    int64_t patch, int64_t seed, double noise_scale) {
  const auto out = NoisedPatchProjection::apply(image, numbers, t, weight, bias, patch, seed, noise_scale);
  return {out[0], out[1], out[2], out[3]};
}

TORCH_LIBRARY_IMPL(pixelgen, CPU, m) {
  m.impl("noised_patch_projection", noised_patch_projection);
  m.impl("noised_patch_projection_backward", noised_patch_projection_backward);
}
TORCH_LIBRARY_IMPL(pixelgen, AutogradCPU, m) {
  m.impl("noised_patch_projection", noised_patch_projection_autograd);
  m.impl("noised_patch_projection_backward", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace
}  // namespace pixelgen
