#include "ops/golden_rms_norm.h"
#include "ops/norm_rows_cotangent.cuh"
#include "ops/uncentred.cuh"

namespace syntonic {

Status golden_rms_norm_cotangent(Stream stream, const NormRowsCotangent& call) {
  return norm_rows_cotangent<Uncentred>(stream, call);
}

Status load_golden_rms_norm_cotangent(DType dtype) {
  return load_norm_rows_cotangent<Uncentred>(dtype);
}

}  // namespace syntonic
