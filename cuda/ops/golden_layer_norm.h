// y = scale * scale_factor * (x - mean) / sqrt(var + epsilon) + bias over rows of x.
#pragma once

#include "ops/norm_rows.h"

namespace syntonic {

// Of a call without a residual; identity is x, and sum_scale 1.
Status golden_layer_norm(Stream stream, const NormRows& call);

// The cotangent of phi_residual_layernorm without a residual: see there.
Status golden_layer_norm_cotangent(Stream stream, const NormRowsCotangent& call);

// Loads the kernels onto the current device: needed before the first launch there.
Status load_golden_layer_norm(DType dtype);

}  // namespace syntonic
