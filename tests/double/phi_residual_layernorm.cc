#include "ops/phi_residual_layernorm.h"

#include "norm.h"

namespace syntonic {

Status phi_residual_layernorm(Stream, const NormRows& call) { return norm::run<true>(call); }

Status phi_residual_layernorm_cotangent(Stream, const NormRowsCotangent& call) {
  return norm::run_cotangent<true>(call);
}

Status load_phi_residual_layernorm(DType) { return kSuccess; }

}  // namespace syntonic
