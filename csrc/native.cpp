// The version of PyTorch that this library was compiled against; it runs with no other.
#include <torch/library.h>
#include <torch/version.h>

#include <string>

TORCH_LIBRARY_FRAGMENT(pixelgen_native, m) {
  m.def("torch_version() -> str", [] { return std::string(TORCH_VERSION); });
}
