#include "residual_component_norm.h"

#include "numbers.h"

namespace syntonic {

Status sum_of_squares(Stream, const SumOfSquares& call) {
  const DType acc = accumulation(call.dtype);
  spoil(call.scratch, acc, call.scratch_size);
  for (int64_t partial = 0; partial < call.partials; ++partial) {
    double sum = 0;
    for (int64_t i = partial * call.count; i < (partial + 1) * call.count; ++i) {
      const double x = load(call.x, call.dtype, i);
      sum += x * x;
    }
    store(call.sums, acc, partial, sum);
  }
  return kSuccess;
}

Status sum_of_squares_cotangent(Stream, const SumOfSquaresCotangent& call) {
  const DType acc = accumulation(call.dtype);
  for (int64_t i = 0; i < call.partials * call.count; ++i) {
    const double slope = 2 * load(call.ct, acc, i / call.count);
    store(call.dx, call.dtype, i, slope * load(call.x, call.dtype, i));
  }
  return kSuccess;
}

Status load_sum_of_squares(DType) { return kSuccess; }

}  // namespace syntonic
