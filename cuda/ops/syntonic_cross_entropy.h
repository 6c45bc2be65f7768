// loss = (max - z[label]) + log_sum: the cross entropy of rows of logits with integer labels.
#pragma once

#include "ops/syntonic_softmax.h"

namespace syntonic {

// The loss of a row in which nothing counts is 0; that of a label out of range is NaN, or 0 if it
// is `ignored`; that of one that does not count +inf. None of these has a gradient, nor a
// normaliser: max and log_sum are 0.
struct SyntonicCrossEntropy {
  SoftmaxLogits logits;   // shape.inner = 1
  const int32_t* labels;  // one per row
  int32_t ignored;        // below 0; 0: none
  void* loss;             // acc, one per row
  void* max;              // acc, one per row; optional, together with log_sum
  void* log_sum;          // acc, one per row
};
Status syntonic_cross_entropy(Stream stream, const SyntonicCrossEntropy& call);

struct SyntonicCrossEntropyCotangent {
  SoftmaxLogits logits;
  const int32_t* labels;
  const void* max;      // acc, one per row
  const void* log_sum;  // acc, one per row
  const void* ct;       // acc, one per row
  void* d_z;            // dtype, rows; optional
  void* d_bias;         // acc, `width` per partial; optional
  void* scratch;        // acc, scratch_size elements: sums of workers before they are folded
  int64_t scratch_size;
  int64_t partials;
};
Status syntonic_cross_entropy_cotangent(Stream stream, const SyntonicCrossEntropyCotangent& call);

Status load_syntonic_cross_entropy(DType dtype);

}  // namespace syntonic
