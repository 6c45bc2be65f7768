// The C face of the double: what the extension module gives to Python, for ctypes.
#include "targets.h"

extern "C" [[gnu::visibility("default")]] const syntonic::Target* syntonic_targets(int64_t* count) {
  static const std::vector<syntonic::Target> targets = [] {
    std::vector<syntonic::Target> all;
    for (const syntonic::Kernel& kernel : syntonic::kernels()) {
      all.insert(all.end(), kernel.targets.begin(), kernel.targets.end());
    }
    return all;
  }();
  *count = static_cast<int64_t>(targets.size());
  return targets.data();
}
