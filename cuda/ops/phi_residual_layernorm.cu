#include "ops/centred.cuh"
#include "ops/norm_rows.cuh"
#include "ops/phi_residual_layernorm.h"

namespace syntonic {

// phi_residual_layernorm_cotangent.cu
Status load_phi_residual_layernorm_cotangent(DType dtype);

Status phi_residual_layernorm(Stream stream, const NormRows& call) {
  return norm_rows<Centred>(stream, call);
}

Status load_phi_residual_layernorm(DType dtype) {
  const Status status = load_norm_rows<Centred>(dtype);
  return status == kSuccess ? load_phi_residual_layernorm_cotangent(dtype) : status;
}

}  // namespace syntonic
