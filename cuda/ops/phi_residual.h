// z = sum_scale * (identity + residual_scale * residual), y = activation(z).
#pragma once

#include "core/types.h"

namespace syntonic {

struct PhiResidual {
  const void* identity;  // dtype, count elements
  const void* residual;  // dtype
  void* y;               // y_dtype
  void* z;               // dtype; null where it is not asked for
  DType dtype;
  DType y_dtype;
  int64_t count;
  double sum_scale;
  double residual_scale;
  Activation activation;
};
Status phi_residual(Stream stream, const PhiResidual& call);

// g = activation'(saved) * ct, d_identity = identity_scale * g, d_residual = residual_scale * g.
struct PhiResidualCotangent {
  const void* saved;  // saved_dtype: gelu and golden_gelu: z; relu: z or y, of the same sign;
                      // none: null
  const void* ct;     // y_dtype
  void* d_identity;   // dtype; null where it is not asked for
  void* d_residual;   // dtype; null where it is not asked for
  DType dtype;
  DType y_dtype;
  DType saved_dtype;
  int64_t count;
  double identity_scale;
  double residual_scale;
  Activation activation;
};
Status phi_residual_cotangent(Stream stream, const PhiResidualCotangent& call);

// Loads the kernels of this operation onto the current device, so that a launch under stream
// capture never has to.
Status load_phi_residual(DType dtype);

}  // namespace syntonic
