// Random 32-bit words of each image for draws of a few numbers: time, label drop. Twin of `words` in philox.py.
#include "operator.h"
#include "philox.h"

namespace pixelgen {
namespace {

constexpr int64_t WORDS_IMAGES = 64;  // of a chunk

// numbers: int64 [B]. Returns int64 [B, count] with values in [0, 2^32).
Tensor random_words(const Tensor& numbers_, int64_t seed, int64_t stream, int64_t count) {
  const Tensor numbers = numbers_.contiguous();
  const int64_t B = numbers.size(0);
  Tensor words = at::empty({B, count}, numbers.options());
  const int64_t* n = numbers.const_data_ptr<int64_t>();
  int64_t* out = words.data_ptr<int64_t>();
  for_chunks(B, WORDS_IMAGES, 8 * count, [&](int64_t, int64_t first, int64_t last) {
    for (int64_t b = first; b < last; b++) {
      const auto image = static_cast<uint64_t>(n[b]);
      for (int64_t i = 0; i < count; i += 4) {
        const Words four = philox4x32(
            static_cast<uint64_t>(seed), static_cast<uint32_t>(i / 4), static_cast<uint32_t>(image),
            static_cast<uint32_t>(image >> 32), static_cast<uint32_t>(stream));
        const int64_t values[4] = {four.w0, four.w1, four.w2, four.w3};
        std::copy_n(values, std::min<int64_t>(4, count - i), out + b * count + i);
      }
    }
  });
  return words;
}

TORCH_LIBRARY_IMPL(pixelgen, CPU, m) { m.impl("random_words", random_words); }
TORCH_LIBRARY_IMPL(pixelgen, AutogradCPU, m) { m.impl("random_words", torch::CppFunction::makeFallthrough()); }

}  // namespace
}  // namespace pixelgen
