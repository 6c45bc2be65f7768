// What batch normalisation reduces: the moments of every channel, and the two sums along a channel
// that its derivative needs. What is left is elementwise: y, for where nothing follows it, and the
// gradient, which belongs to XLA's fusions.
#pragma once

#include "core/types.h"

namespace syntonic {

// "acc" below is accumulation(dtype); results are one row of channels per partial.
//
// The mean is mean + low: near 10^4 the rounding of a single number would show in the deviations.
struct GoldenBatchNormMoments {
  const void* x;      // dtype, channels
  const void* scale;  // acc, one row of channels per group; null: 1
  const void* bias;   // acc, likewise; null: 0
  void* mean;         // acc
  void* low;          // acc: what rounding took from the mean
  void* var;          // acc
  void* slope;        // acc: scale * scale_factor / sqrt(var + epsilon)
  void* shift;        // acc: bias - slope * low, so that y = slope * (x - mean) + shift
  void* scratch;      // acc, scratch_size elements: what the workers find, before it is merged
  int64_t scratch_size;
  DType dtype;
  Channels channels;
  int64_t groups;
  double epsilon;
  double scale_factor;
};
// Elements of scratch memory for each result: no less is enough, more lets more workers share a
// channel.
constexpr int64_t kMomentsScratch = 4;
Status golden_batch_norm_moments(Stream stream, const GoldenBatchNormMoments& call);

// sum = sum of ct and product = sum of (x - mean - low) * ct along each channel.
struct GoldenBatchNormSums {
  const void* x;     // dtype, channels
  const void* mean;  // acc, one row of channels per group
  const void* low;   // acc, likewise: what rounding took from the mean
  const void* ct;    // ct_dtype, channels: dtype or acc
  void* sum;         // acc
  void* product;     // acc
  void* scratch;     // acc, scratch_size elements
  int64_t scratch_size;
  DType dtype;
  DType ct_dtype;
  Channels channels;
  int64_t groups;  // channels.partials is a multiple of it
};
constexpr int64_t kSumsScratch = 2;
Status golden_batch_norm_sums(Stream stream, const GoldenBatchNormSums& call);

// y = slope * (x - mean) + shift.
struct GoldenBatchNormNormalise {
  const void* x;      // dtype, channels
  const void* mean;   // acc, one row of channels per partial
  const void* slope;  // acc, likewise
  const void* shift;  // acc, likewise
  void* y;            // y_dtype, channels
  DType dtype;
  DType y_dtype;
  Channels channels;
};
Status golden_batch_norm_normalise(Stream stream, const GoldenBatchNormNormalise& call);

// Loads the kernels onto the current device: needed before the first launch there.
Status load_golden_batch_norm(DType dtype);
Status load_golden_batch_norm_normalise(DType dtype);

}  // namespace syntonic
