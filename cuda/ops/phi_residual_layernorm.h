// z = sum_scale * (identity + residual_scale * residual), rounded to dtype, and
// y = scale * scale_factor * (z - mean) / sqrt(var + epsilon) + bias over rows of z.
#pragma once

#include "core/types.h"

namespace syntonic {

// "acc" below is accumulation(dtype). Absent operands and results are null.
struct PhiResidualLayernorm {
  const void* identity;  // dtype, rows
  const void* residual;  // dtype, rows; optional: without it z is identity, and is not stored
  const void* scale;     // acc, one row per group; absent: 1
  const void* bias;      // acc, one row per group; absent: 0
  void* y;               // y_dtype, rows
  void* z;               // dtype, rows; optional
  void* statistics;      // acc, kRowStatistics numbers per row; optional
  DType dtype;
  DType y_dtype;
  Rows rows;
  double sum_scale;
  double residual_scale;
  double epsilon;
  double scale_factor;  // square root of the target variance
};
Status phi_residual_layernorm(Stream stream, const PhiResidualLayernorm& call);

// With rstd = 1 / sqrt(var + epsilon), xhat = (z - mean) * rstd and w = scale * scale_factor *
// ct_y:
//   dz         = rstd * (w - mean(w) - xhat * mean(w * xhat)) + ct_z
//   d_identity = identity_scale * dz
//   d_residual = residual_scale * dz
//   d_scale    = sum of scale_factor * ct_y * xhat over the rows of a partial
//   d_bias     = sum of ct_y over the rows of a partial
struct PhiResidualLayernormCotangent {
  const void* z;           // dtype, rows
  const void* statistics;  // acc, kRowStatistics numbers per row
  const void* scale;       // acc, one row per group; absent: 1
  const void* ct_y;        // y_dtype, rows
  const void* ct_z;        // dtype, rows; optional
  void* d_identity;        // dtype, rows; optional
  void* d_residual;        // dtype, rows; optional
  void* d_scale;           // acc, one row per partial; optional
  void* d_bias;            // acc, one row per partial; optional
  void* scratch;           // acc, scratch_size elements: sums of workers before they are folded
  int64_t scratch_size;    // any size is correct, 0 included
  DType dtype;
  DType y_dtype;
  Rows rows;
  // Consecutive stretches of rows.total() / partials rows. A multiple of rows.groups.
  int64_t partials;
  double identity_scale;
  double residual_scale;
  double scale_factor;
};
Status phi_residual_layernorm_cotangent(Stream stream, const PhiResidualLayernormCotangent& call);

// Loads the kernels onto the current device and lets them use all of its shared memory: needed
// before the first launch there.
Status load_phi_residual_layernorm(DType dtype);

}  // namespace syntonic
