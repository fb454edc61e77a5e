// Matrix products that are too small for a library: they live in the first-level cache and are many.
//
//     out[r][n] = start[r][n] + sum_k a[r * a_row + k * a_step] b[k * b_row + n]
//
// A block of the result stays in registers; one operand is read broadcast, the other as vectors. Six rows of two
// vectors are twelve chains of sums, more than the multiply-adds that a processor overlaps, and need eight loads for
// twelve of them; one row of eight vectors would need nine for eight, and wait for them.
#pragma once

#include "operator.h"

namespace pixelgen {

constexpr int LANES = 8;
typedef float Vector __attribute__((vector_size(LANES * sizeof(float))));

// Memory of one task, aligned so that no vector of it lies in two cache lines; not initialised.
class Scratch {
 public:
  explicit Scratch(int64_t floats)
      : data_(static_cast<float*>(::operator new(floats * sizeof(float), std::align_val_t(64)))), next_(data_) {}
  ~Scratch() { ::operator delete(data_, std::align_val_t(64)); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  // The next `floats`, a multiple of 16 for what follows to be aligned too.
  float* take(int64_t floats) { return std::exchange(next_, next_ + floats); }

 private:
  float *data_, *next_;
};

INLINE void load(Vector& v, const float* p) { std::memcpy(&v, p, sizeof v); }
INLINE void store(float* p, const Vector& v) { std::memcpy(p, &v, sizeof v); }

// R rows and V vectors of columns. start: rows start_row apart (0: one row that all begin with), or null for zero.
template <int R, int V>
INLINE void product_block(
    const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t b_row, int64_t K, const float* start,
    int64_t start_row, float* out, int64_t out_row) {
  Vector acc[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) {
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) {
      if (start) {
        load(acc[r][v], start + r * start_row + v * LANES);
      } else {
        acc[r][v] = Vector{};
      }
    }
  }
  for (int64_t k = 0; k < K; k++) {
    Vector row[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) load(row[v], b + k * b_row + v * LANES);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const float value = a[r * a_row + k * a_step];
#pragma GCC unroll 8
      for (int v = 0; v < V; v++) acc[r][v] += value * row[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) {
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) store(out + r * out_row + v * LANES, acc[r][v]);
  }
}

// `rows` rows of V vectors of columns.
template <int V>
INLINE void product_columns(
    int64_t rows, const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t b_row, int64_t K,
    const float* start, int64_t start_row, float* out, int64_t out_row) {
  constexpr int R = V == 2 ? 6 : 8;
  const auto block = [&](auto count, int64_t r) __attribute__((always_inline)) {
    product_block<decltype(count)::value, V>(
        a + r * a_row, a_row, a_step, b, b_row, K, start ? start + r * start_row : nullptr, start_row,
        out + r * out_row, out_row);
  };
  int64_t r = 0;
  for (; r + R <= rows; r += R) block(std::integral_constant<int, R>(), r);
  for (; r + 4 <= rows; r += 4) block(std::integral_constant<int, 4>(), r);
  for (; r < rows; r++) block(std::integral_constant<int, 1>(), r);
}

// `rows` rows of N columns, N a multiple of LANES.
INLINE void product(
    int64_t rows, int64_t N, const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t b_row, int64_t K,
    const float* start, int64_t start_row, float* out, int64_t out_row) {
  int64_t n = 0;
  for (; n + 2 * LANES <= N; n += 2 * LANES) {
    product_columns<2>(
        rows, a, a_row, a_step, b + n, b_row, K, start ? start + n : nullptr, start_row, out + n, out_row);
  }
  if (n < N) {
    product_columns<1>(
        rows, a, a_row, a_step, b + n, b_row, K, start ? start + n : nullptr, start_row, out + n, out_row);
  }
}

// The same as a function of its own, for sizes that are known at run time.
MULTIVERSION void product_any(
    int64_t rows, int64_t N, const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t b_row, int64_t K,
    float* out, int64_t out_row) {
  product(rows, N, a, a_row, a_step, b, b_row, K, nullptr, 0, out, out_row);
}

}  // namespace pixelgen
