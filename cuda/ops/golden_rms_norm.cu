#include "ops/golden_rms_norm.h"
#include "ops/norm_rows.cuh"
#include "ops/uncentred.cuh"

namespace syntonic {

// golden_rms_norm_cotangent.cu
Status load_golden_rms_norm_cotangent(DType dtype);

Status golden_rms_norm(Stream stream, const NormRows& call) {
  return norm_rows<Uncentred>(stream, call);
}

Status load_golden_rms_norm(DType dtype) {
  const Status status = load_norm_rows<Uncentred>(dtype);
  return status == kSuccess ? load_golden_rms_norm_cotangent(dtype) : status;
}

}  // namespace syntonic
