// AdamW and any number of weight averages in one pass over a list of tensors.
//
//     m <- b1 m + (1 - b1) g                    v <- b2 v + (1 - b2) g^2          g = grad_scale * grad
//     p <- (1 - lr w) p - lr (m / (1 - b1^s)) / (sqrt(v / (1 - b2^s)) + eps)
//     a <- d a + (1 - d) p                      for each average a with its decay d
//
// The list is cut into pieces of PIECE elements, which the threads share out whatever tensor they belong to: no thread
// waits at the end of a parameter, and many small parameters cost no more than one large. A step whose `skip` is true
// changes nothing. total_norm is the other pass that a step makes over its gradients: sqrt(sum of squares).
// Loshchilov & Hutter, ICLR 2019, algorithm 2; twin of adamw_ema.py.
#include "operator.h"

namespace pixelgen {
namespace {

constexpr int64_t PIECE = 16384;

// What is the same for all elements of a step.
struct AdamWStep {
  float grad_scale, beta1, one_minus_beta1, beta2, one_minus_beta2, eps;
  float rate;         // lr / (1 - b1^s)
  float correction2;  // 1 / (1 - b2^s)
  float keep_weight;  // 1 - lr w
};

// The corrections are taken in double precision: 1 - b^s loses digits to cancellation in float.
AdamWStep adamw_step(
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
INLINE float adamw_update(const AdamWStep& s, float grad, float& m, float& v, float& p) {
  const float g = s.grad_scale * grad;
  m = s.beta1 * m + s.one_minus_beta1 * g;
  v = s.beta2 * v + s.one_minus_beta2 * g * g;
  p = s.keep_weight * p - s.rate * m / (std::sqrt(v * s.correction2) + s.eps);
  return p;
}

INLINE float ema_update(float one_minus_decay, float average, float p) {
  return average + one_minus_decay * (p - average);
}

MULTIVERSION void adamw_piece(
    const AdamWStep& s, const float* RESTRICT grad, float* RESTRICT m, float* RESTRICT v, float* RESTRICT p,
    int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) adamw_update(s, grad[i], m[i], v[i], p[i]);
}

// The usual case of one average in the same loop, so that p is not read again.
MULTIVERSION void adamw_ema_piece(
    const AdamWStep& s, float one_minus_decay, const float* RESTRICT grad, float* RESTRICT m, float* RESTRICT v,
    float* RESTRICT p, float* RESTRICT ema, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) {
    ema[i] = ema_update(one_minus_decay, ema[i], adamw_update(s, grad[i], m[i], v[i], p[i]));
  }
}

MULTIVERSION void ema_piece(float one_minus_decay, const float* RESTRICT p, float* RESTRICT ema, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) ema[i] = ema_update(one_minus_decay, ema[i], p[i]);
}

MULTIVERSION double square_piece(const float* RESTRICT x, int64_t n) {
  double total = 0.0;
  for (int64_t i = 0; i < n; i += 1024) {
    const int64_t end = std::min(n, i + 1024);
    float square = 0.0f;
#pragma omp simd reduction(+ : square)
    for (int64_t j = i; j < end; j++) square += x[j] * x[j];
    total += square;
  }
  return total;
}

struct Piece {
  int64_t tensor, start, length;
};

std::vector<Piece> pieces(at::TensorList tensors) {
  std::vector<Piece> found;
  for (size_t t = 0; t < tensors.size(); t++) {
    const int64_t n = tensors[t].numel();
    for (int64_t i = 0; i < n; i += PIECE) found.push_back({static_cast<int64_t>(t), i, std::min(PIECE, n - i)});
  }
  return found;
}

// emas: the averages of the first decay for every parameter, then those of the second, and so on.
void adamw_ema_foreach(
    at::TensorList params, at::TensorList grads, at::TensorList exp_avgs, at::TensorList exp_avg_sqs,
    at::TensorList emas, at::TensorList decays, const Tensor& step, const Tensor& skip, const Tensor& grad_scale,
    double lr, double beta1, double beta2, double eps, double weight_decay) {
  if (skip.item<bool>()) return;
  const int64_t count = params.size(), averages = decays.size();
  TORCH_CHECK(static_cast<int64_t>(emas.size()) == averages * count, "adamw_ema: one average per decay and parameter");
  const AdamWStep s =
      adamw_step(lr, beta1, beta2, eps, weight_decay, step.item<double>(), grad_scale.item<double>());
  std::vector<float> one_minus_decay;
  for (const auto& decay : decays) one_minus_decay.push_back(static_cast<float>(1.0 - decay.item<double>()));
  const auto work = pieces(params);
  at::parallel_for(0, work.size(), 2, [&](int64_t begin, int64_t end) {
    for (int64_t w = begin; w < end; w++) {
      const auto [t, start, n] = work[w];
      const float* grad = grads[t].const_data_ptr<float>() + start;
      float *m = exp_avgs[t].data_ptr<float>() + start, *v = exp_avg_sqs[t].data_ptr<float>() + start,
            *p = params[t].data_ptr<float>() + start;
      const auto ema = [&](int64_t a) { return emas[a * count + t].data_ptr<float>() + start; };
      if (averages) {
        adamw_ema_piece(s, one_minus_decay[0], grad, m, v, p, ema(0), n);
      } else {
        adamw_piece(s, grad, m, v, p, n);
      }
      for (int64_t a = 1; a < averages; a++) ema_piece(one_minus_decay[a], p, ema(a), n);
    }
  });
}

void adamw_ema(
    const Tensor& param, const Tensor& grad, const Tensor& exp_avg, const Tensor& exp_avg_sq, at::TensorList emas,
    at::TensorList decays, const Tensor& step, const Tensor& skip, const Tensor& grad_scale,
    const OptionalTensor& bf16_out, double lr, double beta1, double beta2, double eps, double weight_decay) {
  adamw_ema_foreach(
      param, grad, exp_avg, exp_avg_sq, emas, decays, step, skip, grad_scale, lr, beta1, beta2, eps, weight_decay);
  if (bf16_out && !skip.item<bool>()) bf16_out->copy_(param);
}

Tensor total_norm(at::TensorList tensors) {
  const auto work = pieces(tensors);
  std::vector<double> squares(work.size());
  at::parallel_for(0, work.size(), 2, [&](int64_t begin, int64_t end) {
    for (int64_t w = begin; w < end; w++) {
      const auto [t, start, n] = work[w];
      squares[w] = square_piece(tensors[t].const_data_ptr<float>() + start, n);
    }
  });
  double total = 0.0;
  for (const double square : squares) total += square;
  return at::scalar_tensor(std::sqrt(total), at::kFloat);
}

TORCH_LIBRARY_IMPL(pixelgen, CPU, m) { m.impl("adamw_ema", adamw_ema); }

TORCH_LIBRARY_FRAGMENT(pixelgen_native, m) {
  m.def(
      "adamw_ema_foreach(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
      "Tensor(d!)[] emas, Tensor[] decays, Tensor step, Tensor skip, Tensor grad_scale, float lr, float beta1, "
      "float beta2, float eps, float weight_decay) -> ()",
      adamw_ema_foreach);
  m.def("total_norm(Tensor[] tensors) -> Tensor", total_norm);
}

}  // namespace
}  // namespace pixelgen
