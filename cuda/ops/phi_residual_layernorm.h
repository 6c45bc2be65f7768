// y = scale * scale_factor * (z - mean) / sqrt(var + epsilon) + bias over rows of the residual sum
// z.
#pragma once

#include "ops/norm_rows.h"

namespace syntonic {

Status phi_residual_layernorm(Stream stream, const NormRows& call);

// With rstd = 1 / sqrt(var + epsilon), xhat = (z - mean) * rstd and w = scale * scale_factor *
// ct_y:
//   dz      = rstd * (w - mean(w) - xhat * mean(w * xhat)) + ct_z
//   d_scale = sum of scale_factor * ct_y * xhat over the rows of a partial
//   d_bias  = sum of ct_y over the rows of a partial
Status phi_residual_layernorm_cotangent(Stream stream, const NormRowsCotangent& call);

// Loads the kernels onto the current device and lets them use all of its shared memory: needed
// before the first launch there.
Status load_phi_residual_layernorm(DType dtype);

}  // namespace syntonic
