#include "ops/golden_rms_norm.h"

#include "norm.h"

namespace syntonic {

Status golden_rms_norm(Stream, const NormRows& call) { return norm::run<false>(call); }

Status golden_rms_norm_cotangent(Stream, const NormRowsCotangent& call) {
  return norm::run_cotangent<false>(call);
}

Status load_golden_rms_norm(DType) { return kSuccess; }

}  // namespace syntonic
