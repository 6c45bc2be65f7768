// A layer norm is that of a residual sum without a residual: the same kernels.
#include "ops/golden_layer_norm.h"
#include "ops/phi_residual_layernorm.h"

namespace syntonic {

Status golden_layer_norm(Stream stream, const NormRows& call) {
  return phi_residual_layernorm(stream, call);
}

Status golden_layer_norm_cotangent(Stream stream, const NormRowsCotangent& call) {
  return phi_residual_layernorm_cotangent(stream, call);
}

Status load_golden_layer_norm(DType dtype) { return load_phi_residual_layernorm(dtype); }

}  // namespace syntonic
