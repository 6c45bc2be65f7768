// y = scale * scale_factor * z / sqrt(mean(z^2) + epsilon) over rows of the residual sum z.
#pragma once

#include "ops/norm_rows.h"

namespace syntonic {

// Without a bias; of statistics one number a row.
Status phi_residual_rmsnorm(Stream stream, const NormRows& call);

// As golden_rms_norm_cotangent, which has the formulas.
Status phi_residual_rmsnorm_cotangent(Stream stream, const NormRowsCotangent& call);

// Loads the kernels onto the current device: needed before the first launch there.
Status load_phi_residual_rmsnorm(DType dtype);

}  // namespace syntonic
