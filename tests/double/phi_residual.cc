#include "ops/phi_residual.h"

#include "activation.h"
#include "numbers.h"

namespace syntonic {

Status phi_residual(Stream, const PhiResidual& call) {
  in_accumulation(call.dtype, [&](auto zero) {
    using T = decltype(zero);
    const T sum_scale = static_cast<T>(call.sum_scale);
    const T residual_scale = static_cast<T>(call.residual_scale);
    for (int64_t i = 0; i < call.count; ++i) {
      const T identity = static_cast<T>(load(call.identity, call.dtype, i));
      const T residual = static_cast<T>(load(call.residual, call.dtype, i));
      const T z = golden_sum(identity, residual, sum_scale, residual_scale);
      store(call.z, call.dtype, i, z);
      store(call.y, call.y_dtype, i, activate(call.activation, z));
    }
  });
  return kSuccess;
}

Status phi_residual_cotangent(Stream, const PhiResidualCotangent& call) {
  in_accumulation(call.dtype, [&](auto zero) {
    using T = decltype(zero);
    const T identity_scale = static_cast<T>(call.identity_scale);
    const T residual_scale = static_cast<T>(call.residual_scale);
    for (int64_t i = 0; i < call.count; ++i) {
      const T saved = call.saved ? static_cast<T>(load(call.saved, call.saved_dtype, i)) : T(0);
      const T ct = static_cast<T>(load(call.ct, call.y_dtype, i));
      const T g = pull_back(call.activation, saved, ct);
      store(call.d_identity, call.dtype, i, identity_scale * g);
      store(call.d_residual, call.dtype, i, residual_scale * g);
    }
  });
  return kSuccess;
}

Status load_phi_residual(DType) { return kSuccess; }

}  // namespace syntonic
