// What the norms of rows take: every operation that is one fills these.
#pragma once

#include "core/types.h"

namespace syntonic {

// z = sum_scale * (identity + residual_scale * residual), rounded to dtype, is what is normalised.
// "acc" below is accumulation(dtype). Absent operands and results are null.
struct NormRows {
  const void* identity;  // dtype, rows
  const void* residual;  // dtype, rows; optional: without it z is identity, and is not stored
  const void* scale;     // acc, one row per group; absent: 1
  const void* bias;      // acc, one row per group; absent: 0
  void* y;               // y_dtype, rows
  void* z;               // dtype, rows; optional
  void* statistics;      // acc, some numbers per row; optional
  DType dtype;
  DType y_dtype;
  Rows rows;
  double sum_scale;
  double residual_scale;
  double epsilon;
  double scale_factor;  // square root of the target variance
};

struct NormRowsCotangent {
  const void* z;           // dtype, rows
  const void* statistics;  // acc, as the forward pass left them
  const void* scale;       // acc, one row per group; absent: 1
  const void* ct_y;        // y_dtype, rows
  const void* ct_z;        // dtype, rows; optional
  void* d_identity;        // dtype, rows; optional: identity_scale * dz
  void* d_residual;        // dtype, rows; optional: residual_scale * dz
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

}  // namespace syntonic
