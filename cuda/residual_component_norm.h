// Sums of squares of consecutive stretches of an array, the expensive part of its norm.
#pragma once

#include "types.h"

namespace syntonic {

struct SumOfSquares {
  const void* x;         // dtype, partials * count elements
  void* sums;            // accumulation type, one per partial
  void* scratch;         // accumulation type, scratch_size elements
  int64_t scratch_size;  // how many workers may leave a sum there; any size is correct
  DType dtype;
  int64_t partials;
  int64_t count;  // elements in a partial
};
Status sum_of_squares(Stream stream, const SumOfSquares& call);

// dx = 2 ct x.
struct SumOfSquaresCotangent {
  const void* x;   // dtype, partials * count elements
  const void* ct;  // accumulation type, one per partial
  void* dx;        // dtype
  DType dtype;
  int64_t partials;
  int64_t count;  // elements in a partial
};
Status sum_of_squares_cotangent(Stream stream, const SumOfSquaresCotangent& call);

Status load_sum_of_squares(DType dtype);

}  // namespace syntonic
