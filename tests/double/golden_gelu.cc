#include "ops/golden_gelu.h"

#include "activation.h"
#include "numbers.h"

namespace syntonic {

Status golden_gelu(Stream, const GoldenGelu& call) {
  in_accumulation(call.dtype, [&](auto zero) {
    using T = decltype(zero);
    for (int64_t i = 0; i < call.count; ++i) {
      const T x = static_cast<T>(load(call.x, call.dtype, i));
      store(call.y, call.y_dtype, i, activate(Activation::golden_gelu, x));
    }
  });
  return kSuccess;
}

Status golden_gelu_cotangent(Stream, const GoldenGeluCotangent& call) {
  in_accumulation(call.dtype, [&](auto zero) {
    using T = decltype(zero);
    for (int64_t i = 0; i < call.count; ++i) {
      const T x = static_cast<T>(load(call.x, call.dtype, i));
      const T ct = static_cast<T>(load(call.ct, call.y_dtype, i));
      store(call.dx, call.dtype, i, pull_back(Activation::golden_gelu, x, ct));
    }
  });
  return kSuccess;
}

Status load_golden_gelu(DType) { return kSuccess; }

}  // namespace syntonic
