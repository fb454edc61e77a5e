// The CPU bodies of the operators as one translation unit: PyTorch's headers are read once.
#include "adamw_ema.cpp"
#include "attention.cpp"
#include "flow_loss.cpp"
#include "norm_modulate.cpp"
#include "patch_projection.cpp"
#include "philox.cpp"
#include "pixel_mlp.cpp"
#include "pixel_modulate.cpp"
#include "qk_norm_rope.cpp"
#include "swiglu.cpp"

#include <torch/version.h>

TORCH_LIBRARY_FRAGMENT(pixelgen_native, m) {
  // The PyTorch that this library was compiled against; it runs with no other.
  m.def("torch_version() -> str", [] { return std::string(TORCH_VERSION); });
}
