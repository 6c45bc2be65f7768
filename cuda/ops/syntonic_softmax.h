// softmax(z) and log softmax(z) along the middle axis of planes,
//   z = x + bias + scale * log(max(weights, 1e-10)).
#pragma once

#include "core/types.h"

namespace syntonic {

// "acc" below is accumulation(dtype). Absent operands and results are null.
struct SoftmaxLogits {
  const void* x;        // dtype, planes
  const void* bias;     // acc, `width` per group; absent: 0
  const void* weights;  // dtype, planes; absent: no such term
  const void* scale;    // acc, one per group; present with weights
  const void* mask;     // bytes, 0 or 1, planes: what counts; absent: everything
  DType dtype;
  Planes shape;
};

struct SyntonicSoftmax {
  SoftmaxLogits logits;
  void* y;        // dtype, planes
  void* max;      // acc, one per row: the largest z; optional, together with log_sum
  void* log_sum;  // acc, one per row: log of the sum of exp(z - max)
  bool log;       // y = (z - max) - log_sum, not its exponential
};
Status syntonic_softmax(Stream stream, const SyntonicSoftmax& call);

// The cotangents of z and of bias. A softmax is known by its result y, of which the probabilities
// are read; a log softmax by its logits, max and log_sum (y null).
struct SyntonicSoftmaxCotangent {
  SoftmaxLogits logits;  // of a softmax: mask, dtype and shape alone
  const void* y;         // dtype, planes
  const void* max;       // acc, one per row
  const void* log_sum;   // acc, one per row
  const void* ct;        // dtype, planes
  void* d_z;             // dtype, planes; optional
  void* d_bias;          // acc, `width` per partial; optional, for shape.inner = 1
  void* scratch;         // acc, scratch_size elements: room for one number a row, and any more
  int64_t scratch_size;
  int64_t partials;  // consecutive stretches of rows: a multiple of shape.groups
};
Status syntonic_softmax_cotangent(Stream stream, const SyntonicSoftmaxCotangent& call);

// Loads the kernels onto the current device: needed before the first launch there.
Status load_syntonic_softmax(DType dtype);

}  // namespace syntonic
