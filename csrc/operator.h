// What the CPU bodies share: vectorised loops over memory, fixed chunks of work, float32 in and out.
//
// A body computes in float32; other types are converted on the way in and out. Work is cut into chunks whose size does
// not depend on the number of threads, and partial sums are added in the order of the chunks, so that results are
// bitwise repeatable on any number of threads.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
#include <optional>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

// A function that is compiled once for each level of the instruction set and chosen when the library is loaded: a
// binary built here runs on an older processor. What it calls must be INLINE, or it stays at the lowest level.
#if defined(__x86_64__) && defined(__linux__) && !defined(PIXELGEN_ONE_TARGET)
#define MULTIVERSION __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define MULTIVERSION
#endif
#define INLINE static inline __attribute__((always_inline))
#define RESTRICT __restrict__

namespace pixelgen {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Contiguous float32, for reading.
inline Tensor in_float(const Tensor& x) { return x.to(at::kFloat).contiguous(); }

// Float32 rows with unit stride; the rows may be apart, as slices of one packed projection are.
inline Tensor rows_in_float(const Tensor& x) {
  const Tensor y = x.to(at::kFloat);
  return y.stride(-1) == 1 || y.size(-1) == 1 ? y : y.contiguous();
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// body(first, last) over chunks [first, last) of `chunk` rows, in parallel. About 32k elements make a task worth it.
template <typename Body>
inline void for_chunks(int64_t rows, int64_t chunk, int64_t width, const Body& body) {
  const int64_t grain = std::max<int64_t>(1, (1 << 15) / std::max<int64_t>(1, chunk * width));
  at::parallel_for(0, ceil_div(rows, chunk), grain, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; c++) body(c, c * chunk, std::min(rows, (c + 1) * chunk));
  });
}

// Partial sums [chunks, ...] added in their order: [...].
inline Tensor sum_partials(const Tensor& partials) {
  const int64_t chunks = partials.size(0), n = chunks ? partials.numel() / chunks : 0;
  Tensor total = at::zeros(partials.sizes().slice(1), partials.options());
  const float* RESTRICT p = partials.const_data_ptr<float>();
  float* RESTRICT out = total.data_ptr<float>();
  for (int64_t c = 0; c < chunks; c++, p += n) {
    for (int64_t i = 0; i < n; i++) out[i] += p[i];
  }
  return total;
}

// The operator of this name, through the dispatcher, so that tracing, counting and CUDA see it.
template <typename Signature>
auto op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

inline Tensor contiguous_or_zeros(const Tensor& grad, const Tensor& like) {
  return grad.defined() ? grad.contiguous() : at::zeros_like(like);
}

}  // namespace pixelgen
