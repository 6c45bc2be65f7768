#include "ops/centred.cuh"
#include "ops/norm_rows_cotangent.cuh"
#include "ops/phi_residual_layernorm.h"

namespace syntonic {

Status phi_residual_layernorm_cotangent(Stream stream, const NormRowsCotangent& call) {
  return norm_rows_cotangent<Centred>(stream, call);
}

Status load_phi_residual_layernorm_cotangent(DType dtype) {
  return load_norm_rows_cotangent<Centred>(dtype);
}

}  // namespace syntonic
