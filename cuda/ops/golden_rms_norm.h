// y = scale * scale_factor * x / sqrt(mean(x^2) + epsilon) over rows of x.
#pragma once

#include "ops/norm_rows.h"

namespace syntonic {

// Without a bias; of statistics one number a row. The kernels take a residual too.
Status golden_rms_norm(Stream stream, const NormRows& call);

// With rstd = 1 / sqrt(mean(x^2) + epsilon), xhat = x * rstd and w = scale * scale_factor * ct_y:
//   dz      = rstd * (w - xhat * mean(w * xhat)) + ct_z
//   d_scale = sum of scale_factor * ct_y * xhat over the rows of a partial
Status golden_rms_norm_cotangent(Stream stream, const NormRowsCotangent& call);

// Loads the kernels onto the current device and lets them use all of its shared memory: needed
// before the first launch there.
Status load_golden_rms_norm(DType dtype);

}  // namespace syntonic
