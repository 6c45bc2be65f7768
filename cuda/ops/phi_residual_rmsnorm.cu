// The kernels of golden_rms_norm, with a residual.
#include "ops/golden_rms_norm.h"
#include "ops/phi_residual_rmsnorm.h"

namespace syntonic {

Status phi_residual_rmsnorm(Stream stream, const NormRows& call) {
  return golden_rms_norm(stream, call);
}

Status phi_residual_rmsnorm_cotangent(Stream stream, const NormRowsCotangent& call) {
  return golden_rms_norm_cotangent(stream, call);
}

Status load_phi_residual_rmsnorm(DType dtype) { return load_golden_rms_norm(dtype); }

}  // namespace syntonic
