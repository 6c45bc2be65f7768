// Sums of squares of consecutive stretches of an array, the expensive part of its norm.
// There are three, of numbers that are too small to be squared, of most, and of too large ones:
// small * 2^-176 + middle + large * 2^176 for float32 sums, 2^1200 for float64 ones.
#pragma once

#include "core/types.h"

namespace syntonic {

struct SumOfSquares {
  const void* x;         // dtype, partials * count elements
  void* sums;            // accumulation type, three per partial
  void* scratch;         // accumulation type, scratch_size elements
  int64_t scratch_size;  // for the sums of a third as many workers; any size is correct
  DType dtype;
  int64_t partials;
  int64_t count;  // elements in a partial
};
Status sum_of_squares(Stream stream, const SumOfSquares& call);

// dx = x * first * second, in this order.
struct SumOfSquaresCotangent {
  const void* x;       // dtype, partials * count elements
  const void* first;   // accumulation type, one per partial
  const void* second;  // likewise
  void* dx;            // dtype
  DType dtype;
  int64_t partials;
  int64_t count;  // elements in a partial
};
Status sum_of_squares_cotangent(Stream stream, const SumOfSquaresCotangent& call);

Status load_sum_of_squares(DType dtype);

}  // namespace syntonic
