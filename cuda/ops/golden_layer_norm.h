// y = scale * scale_factor * (x - mean) / sqrt(var + epsilon) + bias over rows of x.
#pragma once

#include "core/types.h"

namespace syntonic {

// "acc" below is accumulation(dtype). Absent operands and results are null.
struct GoldenLayerNorm {
  const void* x;      // dtype, rows
  const void* scale;  // acc, one row per group; absent: 1
  const void* bias;   // acc, one row per group; absent: 0
  void* y;            // y_dtype, rows
  void* statistics;   // acc, kRowStatistics numbers per row; optional
  DType dtype;
  DType y_dtype;
  Rows rows;
  double epsilon;
  double scale_factor;  // square root of the target variance
};
Status golden_layer_norm(Stream stream, const GoldenLayerNorm& call);

// The cotangent of phi_residual_layernorm without a residual: see there.
struct GoldenLayerNormCotangent {
  const void* x;           // dtype, rows
  const void* statistics;  // acc, kRowStatistics numbers per row
  const void* scale;       // acc, one row per group; absent: 1
  const void* ct_y;        // y_dtype, rows
  void* d_x;               // dtype, rows; optional
  void* d_scale;           // acc, one row per partial; optional
  void* d_bias;            // acc, one row per partial; optional
  void* scratch;           // acc, scratch_size elements: sums of workers before they are folded
  int64_t scratch_size;    // any size is correct, 0 included
  DType dtype;
  DType y_dtype;
  Rows rows;
  int64_t partials;  // consecutive stretches of rows: a multiple of rows.groups
  double scale_factor;
};
Status golden_layer_norm_cotangent(Stream stream, const GoldenLayerNormCotangent& call);

// Loads the kernels onto the current device: needed before the first launch there.
Status load_golden_layer_norm(DType dtype);

}  // namespace syntonic
