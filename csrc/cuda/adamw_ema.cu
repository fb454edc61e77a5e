// AdamW and one weight average over a list of tensors in one launch, for training that shards nothing.
//
// The Triton kernel updates one flat shard, which is what ZeRO holds. Parameters that are not sharded are many and
// small: here a block takes one piece of PIECE elements, found in a table that the host writes once, so that hundreds of
// parameters cost one launch. The arithmetic is adamw_ema.h, which the CPU body runs and the tests check.
// Pointers are fp32 and on the device. `step`, `skip` and `grad_scale` live there too: the host never waits.
#include <cstdint>

#include "../adamw_ema.h"

namespace pixelgen {

constexpr int PIECE = 4096, THREADS = 256;

// One parameter: its weights, gradient, moments and average (null: not averaged), and its number of elements.
struct Parameter {
  float *param, *exp_avg, *exp_avg_sq, *ema;
  const float* grad;
  int64_t numel;
};

struct Piece {
  int32_t parameter;
  int64_t start;
};

struct Hyper {
  double lr, beta1, beta2, eps, weight_decay;
  float one_minus_decay;
};

__device__ inline AdamWStep step_of(const Hyper& h, float step, float grad_scale) {
  const double correction1 = h.beta1 > 0.0 ? -expm1(step * log(h.beta1)) : 1.0;
  const double correction2 = h.beta2 > 0.0 ? -expm1(step * log(h.beta2)) : 1.0;
  return {grad_scale,
          static_cast<float>(h.beta1), static_cast<float>(1.0 - h.beta1),
          static_cast<float>(h.beta2), static_cast<float>(1.0 - h.beta2),
          static_cast<float>(h.eps), static_cast<float>(h.lr / correction1),
          static_cast<float>(1.0 / correction2), static_cast<float>(1.0 - h.lr * h.weight_decay)};
}

__global__ void __launch_bounds__(THREADS) adamw_ema_kernel(
    const Parameter* __restrict__ parameters, const Piece* __restrict__ pieces, const Hyper hyper,
    const float* __restrict__ step, const bool* __restrict__ skip, const float* __restrict__ grad_scale) {
  if (*skip) return;
  __shared__ AdamWStep s;
  if (threadIdx.x == 0) s = step_of(hyper, *step, *grad_scale);
  __syncthreads();
  const Piece piece = pieces[blockIdx.x];
  const Parameter t = parameters[piece.parameter];
  const int64_t left = t.numel - piece.start, n = left < PIECE ? left : PIECE;
  for (int64_t i = piece.start + threadIdx.x; i < piece.start + n; i += THREADS) {
    float m = t.exp_avg[i], v = t.exp_avg_sq[i], p = t.param[i];
    adamw_update(s, t.grad[i], m, v, p);
    t.exp_avg[i] = m;
    t.exp_avg_sq[i] = v;
    t.param[i] = p;
    if (t.ema) t.ema[i] = ema_update(hyper.one_minus_decay, t.ema[i], p);
  }
}

// parameters, pieces: tables on the device. Starts one block a piece on the stream.
void adamw_ema(
    const Parameter* parameters, const Piece* pieces, int32_t piece_count, const Hyper& hyper, const float* step,
    const bool* skip, const float* grad_scale, cudaStream_t stream) {
  if (piece_count == 0) return;
  adamw_ema_kernel<<<piece_count, THREADS, 0, stream>>>(parameters, pieces, hyper, step, skip, grad_scale);
}

}  // namespace pixelgen
